"""Deadlines, budgets and the time to live: when each of them strikes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from rlhf_operator.api.training import Budget, OnExceeded, TrainingJobSpec
from rlhf_operator.api.training_status import Attempt, TrainingJobStatus, Usage
from rlhf_operator.kinds.training.attempts import is_open, spent, total
from rlhf_operator.kinds.training.objects import later
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.resources import Shape


@dataclass(frozen=True)
class Stop:
    """Why an attempt must end now, and what follows."""

    reason: Reason
    message: str
    action: Literal["Fail", "Suspend"]


@dataclass(frozen=True)
class Limit:
    """A limit that strikes at a time; None: not while nothing runs."""

    at: datetime | None
    stop: Stop

    def struck(self, now: datetime) -> bool:
        return self.at is not None and self.at <= now


def usage_now(status: TrainingJobStatus, now: datetime, size: Shape, cost_per_hour: float | None) -> Usage:
    """Of the job, with the open attempt up to now."""
    current = status.attempts[-1] if status.attempts else None
    live = [spent(current, now, size.gpus, cost_per_hour)] if current is not None and is_open(current) else []
    return total(status, live)


def limits_of(
    spec: TrainingJobSpec, status: TrainingJobStatus, now: datetime, size: Shape, cost_per_hour: float | None
) -> tuple[Limit, ...]:
    """All limits of the job, judged from what it has used up to now."""
    current = status.attempts[-1] if status.attempts else None
    live = current if current is not None and is_open(current) else None
    holds = live is not None and live.scheduled_at is not None
    usage = usage_now(status, now, size, cost_per_hour)
    found = [_pre_running(spec, live), _active(spec, usage, now, holds)]
    if spec.budget is not None:
        found += _budget(spec.budget, usage, now, size.gpus if holds else 0.0, cost_per_hour if holds else None)
    return tuple(limit for limit in found if limit is not None)


def _pre_running(spec: TrainingJobSpec, live: Attempt | None) -> Limit | None:
    seconds = spec.pre_running_deadline_seconds
    if seconds is None or live is None or live.admitted_at is None or live.ready_at is not None:
        return None
    message = f"the pods of attempt {live.number} were not all ready {seconds} s after they were admitted"
    stop = Stop(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, message, "Fail")
    return Limit(later(live.admitted_at, seconds), stop)


def _active(spec: TrainingJobSpec, usage: Usage, now: datetime, holds: bool) -> Limit | None:
    seconds = spec.active_deadline_seconds
    if seconds is None:
        return None
    message = f"the job was active for its activeDeadlineSeconds of {seconds} s"
    left = seconds - usage.initializing_seconds - usage.training_seconds
    return Limit(_when(now, left, 1.0 if holds else 0.0), Stop(Reason.DEADLINE_EXCEEDED, message, "Fail"))


def _budget(budget: Budget, usage: Usage, now: datetime, gpus: float, cost_per_hour: float | None) -> list[Limit]:
    action: Literal["Fail", "Suspend"] = "Fail" if budget.on_exceeded is OnExceeded.FAIL else "Suspend"
    found = []
    if budget.gpu_hours is not None:
        left = budget.gpu_hours * 3600.0 - usage.gpu_seconds
        stop = Stop(Reason.BUDGET_EXHAUSTED, f"the budget of {budget.gpu_hours:g} GPU hours is used up", action)
        found.append(Limit(_when(now, left, gpus), stop))
    if budget.cost_usd is not None:
        left = budget.cost_usd - (usage.cost_usd or 0.0)
        stop = Stop(Reason.BUDGET_EXHAUSTED, f"the budget of {budget.cost_usd:g} USD is used up", action)
        found.append(Limit(_when(now, left, (cost_per_hour or 0.0) / 3600.0), stop))
    return found


def _when(now: datetime, left: float, per_second: float) -> datetime | None:
    """When something is used up at this rate; now when it is already, None when it never is."""
    if left <= 0:
        return now
    seconds = left / per_second if per_second > 0 else None
    return later(now, seconds) if seconds is not None and seconds < 3e9 else None
