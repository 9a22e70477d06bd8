"""What people are told: derived from how the status changed, so nothing is told twice and nothing untold is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_operator.api.conditions import JobCondition, find
from rlhf_operator.api.training_status import Attempt, TrainingJobStatus
from rlhf_operator.kinds.base import Event
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.job import Job

# A condition that becomes so is worth an event; the others are told by the attempts.
_TOLD: dict[tuple[JobCondition, str], str] = {
    (JobCondition.ACCEPTED, "False"): "Warning",
    (JobCondition.GUARDRAILS_HEALTHY, "False"): "Warning",
    (JobCondition.WITHIN_BUDGET, "False"): "Warning",
    (JobCondition.VALIDATED, "True"): "Normal",
    (JobCondition.VALIDATED, "False"): "Warning",
    (JobCondition.SUSPENDED, "True"): "Normal",
    (JobCondition.COMPLETE, "True"): "Normal",
    (JobCondition.FAILED, "True"): "Warning",
}
_AHEAD = ("WillExceedDeadline", "WillExhaustBudget")
_WAITS = (
    "WaitingForUpstream",
    "WaitingForClaim",
    "WaitingForQuota",
    "Unschedulable",
    "ImagePullFailed",
    "CreateContainerConfigError",
)


def events_of(job: Job[Any], draft: Draft) -> tuple[Event, ...]:
    return (*_of_attempts(job.status, draft.status), *_of_conditions(job.status, draft.status))


def _of_attempts(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Event]:
    known = {attempt.number: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        yield from _of_attempt(known.get(attempt.number), attempt)


def _of_attempt(old: Attempt | None, new: Attempt) -> Iterator[Event]:
    if old is None:
        yield Event("Normal", "AttemptStarted", f"attempt {new.number} starts")
    if new.resumed_from_step is not None and (old is None or old.resumed_from_step is None):
        source = f"the checkpoint of step {new.resumed_from_step}"
        if new.converted_from is not None:
            source += f", which was converted: {new.converted_from} ranks wrote it"
        yield Event("Normal", "Resumed", f"attempt {new.number} resumed from {source}")
    if new.skipped_checkpoints and (old is None or not old.skipped_checkpoints):
        for skipped in new.skipped_checkpoints:
            message = f"attempt {new.number} did not use the checkpoint of step {skipped.step} at {skipped.path}: "
            yield Event("Warning", "CheckpointSkipped", message + skipped.reason)
    if new.stopping is not None and (old is None or old.stopping is None):
        yield Event("Normal", "AttemptStopping", f"attempt {new.number} is being ended: {new.message or new.stopping}")
    if new.released_by is not None and (old is None or old.released_by is None):
        yield Event(
            "Normal", "Acknowledged", f"attempt {new.number} is followed by another: Decision {new.released_by}"
        )
    if new.ended_at is not None and new.stopping is None and (old is None or old.ended_at is None):
        yield _end_of(new)


def _end_of(attempt: Attempt) -> Event:
    if attempt.action == "Complete":
        return Event("Normal", "AttemptCompleted", f"attempt {attempt.number} completed: {attempt.message or ''}")
    counts = "counts" if attempt.counted else "does not count"
    follows = {"Restart": f"the job restarts, which {counts}", "Suspend": "the job is paused"}.get(
        attempt.action or "", "the job fails"
    )
    message = f"attempt {attempt.number} ended as {attempt.failure_class}: {attempt.message or ''}; {follows}"
    return Event("Warning", "AttemptFailed", message)


def _of_conditions(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Event]:
    for condition in new.conditions:
        before = find(old.conditions, condition.type)
        if before is not None and (before.status, before.reason) == (condition.status, condition.reason):
            continue
        kind = _TOLD.get((JobCondition(condition.type), condition.status))
        if kind is not None:
            name = condition.reason if kind == "Warning" else condition.type
            yield Event("Warning" if kind == "Warning" else "Normal", name, condition.message)
        elif condition.type == JobCondition.PROGRESSING and condition.reason in _WAITS:
            yield Event("Normal", condition.reason, condition.message)
        elif condition.reason in _AHEAD:
            yield Event("Warning", condition.reason, condition.message)
