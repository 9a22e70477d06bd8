"""Priorities of the work queue: of the keys that are ready, what serves users goes first, then what has not been looked
at yet, then the rest.

A rollback must not wait behind the progress of a thousand training jobs, nor a new job for its pods behind the status
of those that have theirs. Nobody starves: every ``FAIR``-th turn is that of whoever has waited longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from enum import IntEnum

from rlhf_operator.kinds.base import Key

FAIR = 4  # one turn in so many goes by waiting time alone


class Lane(IntEnum):
    URGENT = 0
    NEW = 1
    KNOWN = 2


class Lanes:
    """Keys that wait, each once, with the time since when. ``urgent``: kinds."""

    def __init__(self, urgent: Container[str] = ()) -> None:
        self._urgent = urgent
        self._lanes: tuple[OrderedDict[Key, float], ...] = tuple(OrderedDict() for _ in Lane)
        self._known: set[Key] = set()
        self._turns = 0

    def put(self, key: Key, now: float) -> None:
        self._lanes[self._lane(key)][key] = now

    def take(self) -> tuple[Key, float] | None:
        """The next key and since when it waited."""
        filled = [lane for lane in self._lanes if lane]
        if not filled:
            return None
        self._turns += 1
        lane = filled[0] if self._turns % FAIR else min(filled, key=lambda lane: next(iter(lane.values())))
        return lane.popitem(last=False)

    def looked_at(self, key: Key) -> None:
        self._known.add(key)

    def gone(self, key: Key) -> None:
        """The object does not exist: its name starts anew."""
        self._known.discard(key)

    def clear(self) -> None:
        for lane in self._lanes:
            lane.clear()
        self._known.clear()

    def __contains__(self, key: Key) -> bool:
        return any(key in lane for lane in self._lanes)

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    def _lane(self, key: Key) -> Lane:
        if key.kind in self._urgent:
            return Lane.URGENT
        return Lane.KNOWN if key in self._known else Lane.NEW
