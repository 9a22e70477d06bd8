"""The conditions, counters and phase that follow from the ledger and from what this pass has found."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_operator.api.conditions import JobCondition, Truth, find, is_true, set_condition
from rlhf_operator.api.meta import ConditionStatus
from rlhf_operator.api.training_status import JobPhase, Usage
from rlhf_operator.kinds.training import attempts
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.judges import JUDGES
from rlhf_operator.kinds.training.reasons import Reason

_HELD = (Reason.SUSPENDED, Reason.BUDGET_EXHAUSTED, Reason.GUARDRAIL_BREACHED)


def conclude(draft: Draft) -> None:
    """Completes the status: every condition, in one order; nothing that changes with time alone."""
    if draft.ended is not None and draft.status.completion_time is None:
        draft.set(completion_time=draft.now)
    conditions = draft.status.conditions
    for type, judge in JUDGES.items():
        truth, reason, message = judge(draft)
        conditions = set_condition(
            conditions, type, truth, reason, message, generation=draft.job.generation, now=draft.now
        )
    order = list(JUDGES)
    ours = sorted((c for c in conditions if c.type in order), key=lambda c: order.index(JobCondition(c.type)))
    draft.set(
        conditions=ours,
        phase=phase_of(ours),
        observed_generation=draft.job.generation,
        restarts=attempts.restarts(draft.status),
        restarts_counted=attempts.counted(draft.status),
        usage=_usage(draft),
    )


def refuse(draft: Draft, problem: str) -> None:
    """A spec that cannot be read: nothing is touched, and only that is said. A spec that can lifts it."""
    known = [JobCondition.ACCEPTED]
    if draft.open is None and draft.status.completion_time is None:
        known.append(JobCondition.FAILED)
    conditions = draft.status.conditions
    for type in known:
        truth = Truth.of(type is JobCondition.FAILED)
        conditions = set_condition(
            conditions, type, truth, Reason.INVALID_DATA, problem, generation=draft.job.generation, now=draft.now
        )
    draft.set(conditions=conditions, phase=phase_of(conditions), observed_generation=draft.job.generation)


def phase_of(conditions: Sequence[ConditionStatus]) -> JobPhase:
    """Derived from conditions alone."""
    if is_true(conditions, JobCondition.FAILED):
        return JobPhase.FAILED
    if is_true(conditions, JobCondition.COMPLETE):
        return JobPhase.SUCCEEDED
    progressing = find(conditions, JobCondition.PROGRESSING)
    reason = progressing.reason if progressing else Reason.NOT_YET
    if is_true(conditions, JobCondition.SUSPENDED) or reason in _HELD:
        return JobPhase.SUSPENDED
    if reason == Reason.RESTARTING:
        return JobPhase.RESTARTING
    admitted = find(conditions, JobCondition.ADMITTED)
    if admitted is None or admitted.status == Truth.UNKNOWN:
        return JobPhase.PENDING
    if admitted.status == Truth.FALSE:
        return JobPhase.QUEUED
    pods_ready = is_true(conditions, JobCondition.PODS_READY)
    if is_true(conditions, JobCondition.PROGRESSING):
        return JobPhase.RUNNING if pods_ready else JobPhase.DEGRADED
    return JobPhase.DEGRADED if reason in (Reason.STOPPING, Reason.NO_PROGRESS) else JobPhase.INITIALIZING


def _usage(draft: Draft) -> Usage:
    """As of the last report that was written: a number that moved by itself would be a write at rest."""
    attempt, progress = draft.open, draft.status.progress
    if attempt is None:
        return attempts.total(draft.status)
    current = progress is not None and progress.attempt == attempt.number
    at = progress.reported_at if progress is not None and current else attempt.queued_at or attempt.started_at
    return attempts.total(draft.status, [attempts.spent(attempt, at, draft.size.gpus, draft.cost_per_hour)])
