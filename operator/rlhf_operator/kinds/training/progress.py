"""What rank 0 reports, pulled about every 10 s, and what of it is worth a write to the status.

A report is believed when it names this job and this attempt. The status takes one in 30 s, and at once: the first
one, a new checkpoint, a guardrail that changed. A missed pull is never a failure of the training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from rlhf_operator.api.training_status import MAX_CHECKPOINTS_KEPT, ArtifactStatus, Attempt, Progress, TrainingJobStatus
from rlhf_operator.kinds.base import Object, Pull
from rlhf_operator.kinds.training.attempts import edit
from rlhf_operator.kinds.training.job import Job
from rlhf_operator.kinds.training.objects import text, uid_of
from rlhf_operator.kinds.training.pods import index_of
from rlhf_operator.kinds.training.storage import uri_of
from rlhf_trainer.wire import (
    STATUS_PORT,
    CheckpointRecord,
    FailureClass,
    GuardrailReport,
    ReportPhase,
    Result,
    SkippedCheckpoint,
    StatusReport,
    Verdict,
)

PULL_SECONDS = 10.0
WRITE_EVERY = timedelta(seconds=30)
_MAX_METRICS, _MAX_GUARDRAILS, _MAX_VERDICTS, _MAX_SKIPPED, _MAX_LINEAGE = 64, 16, 32, 5, 32


@dataclass(frozen=True)
class Report:
    """A believed report, and when it was pulled."""

    body: StatusReport
    at: datetime


def pull_of(pods: tuple[Object, ...]) -> Pull | None:
    """Of the running pod with index 0; by its uid, so that another pod's answer is never taken for it."""
    for pod in pods:
        address = text(pod, "status", "podIP")
        if index_of(pod) == 0 and address and text(pod, "status", "phase") == "Running":
            host = f"[{address}]" if ":" in address else address
            return Pull(f"status/{uid_of(pod)}", f"http://{host}:{STATUS_PORT}/status", PULL_SECONDS)
    return None


def report_of(job: Job[Any], attempt: Attempt, pull: Pull | None) -> Report | None:
    """The newest report, if it is about this attempt of this job."""
    pulled = job.observed.pulled.get(pull.key) if pull is not None else None
    if pulled is None or pulled.body is None or pulled.at is None:
        return None
    try:
        body = StatusReport.model_validate(pulled.body)
    except ValidationError:
        return None
    return Report(body, pulled.at) if body.uid == job.uid and body.attempt == attempt.number else None


def take_report(status: TrainingJobStatus, attempt: Attempt, report: Report) -> TrainingJobStatus:
    """The status with the report in it, if it is worth a write."""
    if not _worth_it(status, attempt, report):
        return status
    body = report.body
    trains = body.phase is not ReportPhase.INITIALIZING
    if trains:
        status = _without_passed_over(status, attempt, body.resumed_from)
    status = take_checkpoints(status, body.checkpoints)
    status = status.model_copy(
        update={
            "progress": Progress(
                attempt=attempt.number,
                phase=body.phase,
                step=body.step,
                total_steps=body.total_steps,
                world_size=body.world_size,
                last_step_at=body.last_step_at,
                expected_end_at=body.expected_end_at,
                reported_at=report.at,
            ),
            "metrics": _metrics(body.metrics),
            "guardrails": _guardrails(body.guardrails),
            "verdicts": _verdicts(body.verdicts) or status.verdicts,
        }
    )
    return edit(
        status,
        attempt.number,
        step=max(attempt.step, body.step),
        running_at=attempt.running_at or (report.at if trains else None),
        **_resumption(attempt, body.resumed_from, body.skipped_checkpoints),
    )


def take_result(status: TrainingJobStatus, attempt: Attempt, result: Result) -> TrainingJobStatus:
    """What rank 0's result says beyond how it ended: it outlives the pods in the status only."""
    status = take_checkpoints(status, (result.checkpoint,) if result.checkpoint else ())
    artifact = result.artifact and uri_of(result.artifact.path)
    changes: dict[str, Any] = {}
    if result.artifact and artifact:
        changes["artifact"] = ArtifactStatus(uri=artifact, digest=result.artifact.digest)
    changes["progress"] = _final_progress(status.progress, attempt, result)
    if result.verdicts or (result.failure_class is FailureClass.SUCCESS and not _judged(status.progress, attempt)):
        changes["verdicts"] = _verdicts(result.verdicts)
    if result.guardrails:
        changes["guardrails"] = _guardrails(result.guardrails)
    if result.metrics:
        changes["metrics"] = _metrics(result.metrics)
    if result.lineage:  # what the operator resolved itself is not overwritten
        changes["lineage"] = {**_bounded(result.lineage, _MAX_LINEAGE - len(status.lineage)), **status.lineage}
    return edit(
        status.model_copy(update=changes),
        attempt.number,
        step=max(attempt.step, result.step),
        **_resumption(attempt, result.resumed_from, result.skipped_checkpoints),
    )


def _judged(known: Progress | None, attempt: Attempt) -> bool:
    """Whether the verdicts that were reported are about what this attempt made: those before it trained are not."""
    return (
        known is not None and known.attempt == attempt.number and known.phase in (ReportPhase.SAVING, ReportPhase.DONE)
    )


def _final_progress(known: Progress | None, attempt: Attempt, result: Result) -> Progress | None:
    """Where the attempt got to; one that ended before its first report was read has only its result to say so."""
    if known is not None and known.attempt == attempt.number:
        total = result.total_steps or known.total_steps  # a run may end between two reports, the first before it knew
        reached = {"step": max(known.step, result.step), "total_steps": total, "expected_end_at": None}
        return known.model_copy(update=reached)
    if not result.total_steps:  # it never began to train
        return known
    return Progress(
        attempt=attempt.number,
        phase=ReportPhase.DONE,
        step=result.step,
        total_steps=result.total_steps,
        world_size=result.world_size,
        reported_at=result.finished_at,
    )


def take_checkpoints(status: TrainingJobStatus, records: tuple[CheckpointRecord, ...]) -> TrainingJobStatus:
    """The ledger of checkpoints: the newest ones, each path once."""
    known = {checkpoint.path: checkpoint for checkpoint in (*status.checkpoints, *records)}
    newest = sorted(known.values(), key=lambda checkpoint: (checkpoint.step, checkpoint.attempt, checkpoint.path))
    return status.model_copy(update={"checkpoints": newest[-MAX_CHECKPOINTS_KEPT:]})


def _without_passed_over(
    status: TrainingJobStatus, attempt: Attempt, resumed: CheckpointRecord | None
) -> TrainingJobStatus:
    """An attempt starts from the furthest checkpoint that verifies: those beyond it are bad, or gone."""
    start = resumed.step if resumed is not None else 0
    kept = [known for known in status.checkpoints if known.attempt >= attempt.number or known.step <= start]
    return status.model_copy(update={"checkpoints": kept})


def _worth_it(status: TrainingJobStatus, attempt: Attempt, report: Report) -> bool:
    last, body = status.progress, report.body
    if last is None or last.attempt != attempt.number:
        return True
    known = {checkpoint.path for checkpoint in status.checkpoints}
    newest = max((c.step for c in status.checkpoints), default=-1)
    if any(checkpoint.path not in known and checkpoint.step > newest for checkpoint in body.checkpoints):
        return True
    if [g.state for g in status.guardrails] != [g.state for g in body.guardrails[:_MAX_GUARDRAILS]]:
        return True
    if attempt.running_at is None and body.phase is not ReportPhase.INITIALIZING:
        return True
    changed = (last.phase, last.step) != (body.phase, body.step)
    return changed and report.at - last.reported_at >= WRITE_EVERY


def _resumption(
    attempt: Attempt, resumed: CheckpointRecord | None, skipped: tuple[SkippedCheckpoint, ...]
) -> dict[str, Any]:
    step = attempt.resumed_from_step if attempt.resumed_from_step is not None else (resumed.step if resumed else None)
    kept = attempt.skipped_checkpoints or [
        entry.model_copy(update={"reason": entry.reason[:512]}) for entry in skipped[:_MAX_SKIPPED]
    ]
    converted = attempt.converted_from or (resumed.converted_from if resumed else None)
    return {"resumed_from_step": step, "converted_from": converted, "skipped_checkpoints": kept}


# A run that diverges reports NaN; JSON has none, and the API server would refuse the whole status for it.


def _metrics(values: Mapping[str, float]) -> dict[str, float]:
    return _bounded({name: value for name, value in values.items() if math.isfinite(value)}, _MAX_METRICS)


def _verdicts(found: Sequence[Verdict]) -> list[Verdict]:
    return [verdict.model_copy(update=_without_nan(verdict)) for verdict in found[:_MAX_VERDICTS]]


def _without_nan(verdict: Verdict) -> dict[str, None]:
    numbers = {name: getattr(verdict, name) for name in ("estimate", "lower", "upper", "threshold")}
    return {name: None for name, value in numbers.items() if value is not None and not math.isfinite(value)}


def _guardrails(found: Sequence[GuardrailReport]) -> list[GuardrailReport]:
    """What is not finite reads as the largest number there is."""
    return [
        guardrail if math.isfinite(guardrail.value) else guardrail.model_copy(update={"value": sys.float_info.max})
        for guardrail in found[:_MAX_GUARDRAILS]
    ]


def _bounded(values: Any, limit: int) -> dict[str, Any]:
    return {name: values[name] for name in sorted(values)[: max(limit, 0)]}
