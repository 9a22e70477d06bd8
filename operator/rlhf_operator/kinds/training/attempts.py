"""The attempt ledger: entries, what is derived from them, and what an attempt has used so far."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from rlhf_operator.api.training_status import MAX_ATTEMPTS_KEPT, Attempt, EvictedAttempts, TrainingJobStatus, Usage
from rlhf_trainer.wire import FailureClass

_FIRST_BACKOFF, _LONGEST_BACKOFF = 10.0, 360.0


def is_open(attempt: Attempt | None) -> bool:
    return attempt is not None and attempt.ended_at is None


def record(status: TrainingJobStatus, attempt: Attempt) -> TrainingJobStatus:
    """The status with this entry added or replaced; the oldest ended entries leave into the totals."""
    entries = sorted([*(a for a in status.attempts if a.number != attempt.number), attempt], key=lambda a: a.number)
    evicted = status.evicted_attempts or EvictedAttempts()
    while len(entries) > MAX_ATTEMPTS_KEPT:
        gone = entries.pop(0)
        evicted = EvictedAttempts(
            count=evicted.count + 1,
            restarts=evicted.restarts + (gone.action == "Restart"),
            counted=evicted.counted + gone.counted,
            usage=add(evicted.usage, gone.usage),
        )
    return status.model_copy(
        update={
            "attempts": entries,
            "evicted_attempts": evicted if evicted.count else status.evicted_attempts,
            "attempt": max(status.attempt, attempt.number),
        }
    )


def edit(status: TrainingJobStatus, number: int, **changes: Any) -> TrainingJobStatus:
    """The status with fields of one entry changed; unchanged when there is no such entry."""
    found = next((attempt for attempt in status.attempts if attempt.number == number), None)
    return record(status, found.model_copy(update=changes)) if found is not None else status


def restarts(status: TrainingJobStatus) -> int:
    kept = sum(attempt.action == "Restart" for attempt in status.attempts)
    return kept + (status.evicted_attempts.restarts if status.evicted_attempts else 0)


def counted(status: TrainingJobStatus) -> int:
    kept = sum(attempt.counted for attempt in status.attempts)
    return kept + (status.evicted_attempts.counted if status.evicted_attempts else 0)


def backoff(status: TrainingJobStatus) -> timedelta:
    """Before the next attempt: grows with the attempts in a row that finished no step.

    A failure of unknown cause never restarts at once, any other does the first time.
    """
    last = status.attempts[-1] if status.attempts else None
    if last is None or last.action != "Restart":
        return timedelta(0)
    fruitless = 0
    for attempt in reversed(status.attempts):
        if attempt.action != "Restart" or attempt.step > (attempt.resumed_from_step or 0):
            break
        fruitless += 1
    power = max(fruitless - 1, 0) if last.failure_class == FailureClass.UNKNOWN else fruitless - 2
    return timedelta(seconds=min(_FIRST_BACKOFF * 2.0 ** min(power, 10), _LONGEST_BACKOFF) if power >= 0 else 0.0)


def spent(attempt: Attempt, now: datetime, gpus: float, cost_per_hour: float | None) -> Usage:
    """What the attempt has used until it ended, or until now: what evictions folded in, and the present run.

    `gpus` and `cost_per_hour` are for an entry that does not say what its pods hold: one whose status was lost.
    """
    if attempt.ended_at is not None:
        return attempt.usage
    if attempt.gpus is not None:
        gpus, cost_per_hour = attempt.gpus, attempt.cost_per_hour
    queued_at, scheduled, running = attempt.queued_at or attempt.started_at, attempt.scheduled_at, attempt.running_at
    held = _seconds(scheduled, now)
    training = _seconds(running, now)
    live = Usage(
        queued_seconds=_seconds(queued_at, scheduled or now),
        initializing_seconds=round(max(held - training, 0.0), 3),
        training_seconds=training,
        gpu_seconds=round(held * gpus, 3),
        cost_usd=None if cost_per_hour is None else round(held / 3600.0 * cost_per_hour, 6),
    )
    return add(attempt.usage, live)


def folded(attempt: Attempt, now: datetime, gpus: float, cost_per_hour: float | None) -> Attempt:
    """After an eviction: the use so far is kept, and the attempt waits in its queue again."""
    fresh = dict.fromkeys(("admitted_at", "scheduled_at", "ready_at", "running_at", *_FAILURE))
    return attempt.model_copy(update={**fresh, "usage": spent(attempt, now, gpus, cost_per_hour), "queued_at": now})


_FAILURE = ("failed_at", "failure_class", "reason", "message", "exit_code")


def add(first: Usage, second: Usage) -> Usage:
    costs = [cost for cost in (first.cost_usd, second.cost_usd) if cost is not None]
    return Usage(
        queued_seconds=round(first.queued_seconds + second.queued_seconds, 3),
        initializing_seconds=round(first.initializing_seconds + second.initializing_seconds, 3),
        training_seconds=round(first.training_seconds + second.training_seconds, 3),
        lost_seconds=round(first.lost_seconds + second.lost_seconds, 3),
        gpu_seconds=round(first.gpu_seconds + second.gpu_seconds, 3),
        cost_usd=round(sum(costs), 6) if costs else None,
    )


def total(status: TrainingJobStatus, usages: Iterable[Usage] = ()) -> Usage:
    """Of all ended attempts, kept or evicted, and of what is given."""
    result = status.evicted_attempts.usage if status.evicted_attempts else Usage()
    for usage in (*(a.usage for a in status.attempts if a.ended_at is not None), *usages):
        result = add(result, usage)
    return result


def _seconds(start: datetime | None, end: datetime) -> float:
    return round(max((end - start).total_seconds(), 0.0), 3) if start is not None else 0.0
