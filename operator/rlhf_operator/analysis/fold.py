"""Cumulative gateway counters -> what is new in them, each count exactly once.

A gateway pod counts up from 0 in each of its processes (`epoch`). The counters last folded are kept, so what is new
is a difference: reading twice, late or out of order adds nothing. A new epoch starts from 0 again; an epoch that
another one replaced is never read again. What a pod had counted but not yet reported when it died is lost; nothing
is ever invented in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_PODS = 32  # beyond it the ones that were not read longest are forgotten
MAX_PAST_EPOCHS = 8


class RowName(NamedTuple):
    """One row of counters of one pod."""

    stage: int
    arm: str  # stable | canary

    def __str__(self) -> str:
        return f"{self.stage}/{self.arm}"


@dataclass(frozen=True)
class Counts:
    """Conversations of one arm, and what became of them."""

    conversations: int = 0
    failed: int = 0
    judged: int = 0  # by the safety filter
    violating: int = 0
    harmful_served: int = 0  # requests, not conversations
    latency: tuple[int, ...] = ()  # one per conversation, by bucket

    def __add__(self, other: Counts) -> Counts:
        return Counts.of(_elementwise(self.numbers(), other.numbers(), lambda a, b: a + b))

    def numbers(self) -> list[int]:
        return [self.conversations, self.failed, self.judged, self.violating, self.harmful_served, *self.latency]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Counts:
        conversations, failed, judged, violating, harmful_served = [*numbers[:5], *([0] * (5 - len(numbers)))]
        return cls(conversations, failed, judged, violating, harmful_served, tuple(numbers[5:]))

    def beyond(self, seen: Counts) -> Counts:
        """What is new against `seen`; never negative."""
        return Counts.of(_elementwise(self.numbers(), seen.numbers(), lambda now, before: max(0, now - before)))

    def joined(self, seen: Counts) -> Counts:
        """The larger of both, number by number: what has been folded never shrinks."""
        return Counts.of(_elementwise(self.numbers(), seen.numbers(), max))


class Reading(NamedTuple):
    """One pod's counters at one moment, of the rows that matter."""

    pod_uid: str
    epoch: str
    rows: Mapping[RowName, Counts]


@dataclass(frozen=True)
class Seen:
    """What has been folded of one pod."""

    epoch: str
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    past: tuple[str, ...] = ()


Pods = Mapping[str, Seen]  # by pod uid, least recently read first


def fold(pods: Pods, readings: Iterable[Reading]) -> tuple[dict[str, Seen], dict[RowName, Counts]]:
    """The pods with the readings folded in, and what was new, summed over pods."""
    folded = dict(pods)
    new: dict[RowName, Counts] = {}
    for reading in readings:
        before = folded.get(reading.pod_uid)
        if before is not None and reading.epoch in before.past:
            continue
        after = _entered(before, reading.epoch)
        rows = dict(after.rows)
        for name, counts in reading.rows.items():
            seen = Counts.of(rows.get(str(name), ()))
            fresh = counts.beyond(seen)
            if any(fresh.numbers()):
                new[name] = new.get(name, Counts()) + fresh
                rows[str(name)] = tuple(counts.joined(seen).numbers())
        if rows != after.rows or after is not before:
            folded.pop(reading.pod_uid, None)
            folded[reading.pod_uid] = Seen(after.epoch, rows, after.past)
    return dict(list(folded.items())[-MAX_PODS:]), new


def forget_rows(pods: Pods, oldest_stage: int) -> dict[str, Seen]:
    """Without the rows of stages before `oldest_stage`, which are not read any more: status stays bounded."""
    return {
        uid: Seen(
            seen.epoch,
            {name: row for name, row in seen.rows.items() if int(name.split("/")[0]) >= oldest_stage},
            seen.past,
        )
        for uid, seen in pods.items()
    }


def _entered(before: Seen | None, epoch: str) -> Seen:
    if before is None:
        return Seen(epoch)
    if before.epoch == epoch:
        return before
    return Seen(epoch, {}, (*before.past, before.epoch)[-MAX_PAST_EPOCHS:])


def _elementwise(first: Sequence[int], second: Sequence[int], combine: Callable[[int, int], int]) -> list[int]:
    length = max(len(first), len(second))
    a = [*first, *([0] * (length - len(first)))]
    b = [*second, *([0] * (length - len(second)))]
    return [combine(x, y) for x, y in zip(a, b, strict=True)]
