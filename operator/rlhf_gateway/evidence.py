"""Cumulative counts of what each arm did, and the memory that counts every conversation once. Pure; no clock, no I/O.

The unit of judgement is the conversation, because its requests depend on each other. To count it once, this pod
remembers which conversations it has seen, up to a bound. When the memory is full of one stage, half of its
conversations are forgotten and never looked at again, by a bit of their hash, and so is that half of those to come:
they are left out of the conversation counts (and reported as left out) rather than perhaps counted twice. The hash
knows nothing of arms, so leaving out favours neither, and a long stage goes on being counted, if ever more slowly.
Traffic outside of stages, which is no evidence, never takes the memory of one: a stage that is interrupted goes on. A
lone request cannot come back, and needs no memory.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf_gateway.assignment import Conversation
from rlhf_gateway.wire import Arm, ArmCounts, Evidence

# Upper bounds in milliseconds: ten per decade (preferred numbers R10), so that a quantile read from counts is within
# 26 % of the truth anywhere and round limits (100, 250, 500 ms, 1 s) are bounds themselves.
_R10 = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
LATENCY_BOUNDS_MS: tuple[float, ...] = tuple(
    round(step * scale, 3) for scale in (1.0, 10.0, 100.0, 1000.0, 10_000.0) for step in _R10
)

_SEEN, _FAILED, _JUDGED, _VIOLATING, _TIMED = 1, 2, 4, 8, 16


class Scope(NamedTuple):
    """Within a scope a conversation counts once per row: one candidate's assignment in one stage."""

    salt: str
    stage: int
    tried: bool = True  # False: there is no candidate, as before a trial or while one has no pod


class RowKey(NamedTuple):
    """One row of the evidence."""

    stage: int
    arm: Arm
    revision: str
    shadow: bool


@dataclass(frozen=True)
class Outcome:
    """One request, as one arm answered it.

    violating: None when no filter judged it (no filter, or no answer). latency_ms: None when there was no whole answer.
    """

    failed: bool = False
    violating: bool | None = None
    harmful_served: bool = False
    latency_ms: float | None = None


@dataclass
class _Row:
    requests: int = 0
    failures: int = 0
    diverted: int = 0
    judged: int = 0
    violations: int = 0
    harmful_served: int = 0
    conversations: int = 0
    failed_conversations: int = 0
    judged_conversations: int = 0
    violating_conversations: int = 0
    latency_sum_ms: float = 0.0
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_MS) + 1))
    first_latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_MS) + 1))


class Ledger:
    """All counts of this process. Not thread-safe: it lives on the event loop."""

    def __init__(self, pod_uid: str, epoch: str, max_conversations: int = 200_000, max_rows: int = 64) -> None:
        self.pod_uid = pod_uid
        self.epoch = epoch
        self.uncounted_conversations = 0
        self._max_conversations = max_conversations
        self._max_rows = max_rows
        self._rows: dict[RowKey, _Row] = {}  # oldest first; rows of stages long past are given up
        self._units: dict[str, int] = {}
        self._seen: dict[Scope, dict[RowKey, dict[bytes, int]]] = {}  # oldest scope first
        self._remembered = 0
        self._halvings: dict[Scope, int] = {}  # how often half of a scope's conversations were given up
        # Scopes whose memory was given up: their conversations are never counted again. One entry per stage that was
        # ever left behind, so it stays small for the life of a pod.
        self._retired: set[Scope] = set()

    @property
    def remembered(self) -> int:
        """Conversations in memory, over all rows."""
        return self._remembered

    def record(self, scope: Scope | None, key: RowKey, conversation: Conversation, outcome: Outcome) -> None:
        """Count one answered (or failed) request, and in a scope its conversation."""
        row = self._row(key)
        row.requests += 1
        row.failures += outcome.failed
        row.judged += outcome.violating is not None
        row.violations += outcome.violating is True
        row.harmful_served += outcome.harmful_served
        if not key.shadow:
            self._units[conversation.unit] = self._units.get(conversation.unit, 0) + 1
        bucket = None
        if outcome.latency_ms is not None:
            bucket = bisect_left(LATENCY_BOUNDS_MS, outcome.latency_ms)
            row.latency[bucket] += 1
            row.latency_sum_ms += outcome.latency_ms
        if scope is not None:
            self._count_conversation(scope, key, row, conversation, outcome, bucket)

    def divert(self, key: RowKey) -> None:
        """Count a request that left this arm unanswered because the arm was ejected."""
        self._row(key).diverted += 1

    def harmful_reanswer(self, key: RowKey) -> None:
        """Count a tripped answer that stable gave in place of canary: it reached a user, but is no sample of stable."""
        self._row(key).harmful_served += 1

    def latency_sums_ms(self) -> dict[RowKey, float]:
        """Sum of latencies per row, for histograms."""
        return {key: row.latency_sum_ms for key, row in self._rows.items()}

    def snapshot(self, generation: int) -> Evidence:
        """Everything counted so far."""
        return Evidence(
            pod_uid=self.pod_uid,
            epoch=self.epoch,
            generation=generation,
            latency_bounds_ms=LATENCY_BOUNDS_MS,
            counts=tuple(_counts(key, row) for key, row in sorted(self._rows.items())),
            units=dict(self._units),
            uncounted_conversations=self.uncounted_conversations,
        )

    def _row(self, key: RowKey) -> _Row:
        if key not in self._rows and len(self._rows) >= self._max_rows:
            del self._rows[next(iter(self._rows))]
        return self._rows.setdefault(key, _Row())

    def _count_conversation(
        self, scope: Scope, key: RowKey, row: _Row, conversation: Conversation, outcome: Outcome, bucket: int | None
    ) -> None:
        mark = hashlib.blake2b(conversation.key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        seen = {} if conversation.unit == "request" else self._memory(scope, key)
        if seen is None or (conversation.unit != "request" and not self._keeps(scope, seen, mark)):
            self.uncounted_conversations += 1
            return
        flags = seen.get(mark, 0)
        now = flags | _SEEN
        now |= _FAILED * outcome.failed | _TIMED * (bucket is not None)
        now |= _JUDGED * (outcome.violating is not None) | _VIOLATING * (outcome.violating is True)
        new = now & ~flags
        seen[mark] = now
        self._remembered += not flags and conversation.unit != "request"
        row.conversations += bool(new & _SEEN)
        row.failed_conversations += bool(new & _FAILED)
        row.judged_conversations += bool(new & _JUDGED)
        row.violating_conversations += bool(new & _VIOLATING)
        if bucket is not None and new & _TIMED:
            row.first_latency[bucket] += 1

    def _memory(self, scope: Scope, key: RowKey) -> dict[bytes, int] | None:
        if scope in self._retired:
            return None
        return self._seen.setdefault(scope, {}).setdefault(key, {})

    def _keeps(self, scope: Scope, seen: dict[bytes, int], mark: bytes) -> bool:
        """Whether a conversation is, or may be, remembered; makes room by giving up scopes, what is outside of trials
        first and older ones before newer ones, and by halves where it is this one's turn."""
        while mark not in seen and self._in_share(scope, mark) and self._remembered >= self._max_conversations:
            oldest = next((other for other in self._seen if not other.tried), next(iter(self._seen)))
            if oldest == scope:
                self._halve(scope)
                continue
            self._remembered -= sum(len(seen) for seen in self._seen.pop(oldest).values())
            self._halvings.pop(oldest, None)
            self._retired.add(oldest)
        return self._in_share(scope, mark)

    def _halve(self, scope: Scope) -> None:
        self._halvings[scope] = self._halvings.get(scope, 0) + 1
        for seen in self._seen[scope].values():
            gone = [mark for mark in seen if not self._in_share(scope, mark)]
            for mark in gone:
                del seen[mark]
            self._remembered -= len(gone)

    def _in_share(self, scope: Scope, mark: bytes) -> bool:
        return int.from_bytes(mark) % (1 << self._halvings.get(scope, 0)) == 0


def _counts(key: RowKey, row: _Row) -> ArmCounts:
    return ArmCounts(
        **key._asdict(),
        requests=row.requests,
        failures=row.failures,
        diverted=row.diverted,
        judged=row.judged,
        violations=row.violations,
        harmful_served=row.harmful_served,
        conversations=row.conversations,
        failed_conversations=row.failed_conversations,
        judged_conversations=row.judged_conversations,
        violating_conversations=row.violating_conversations,
        latency_buckets=tuple(row.latency),
        latency_conversation_buckets=tuple(row.first_latency),
    )
