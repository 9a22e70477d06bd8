"""A job that has ended: its children live for the time to live, and a waived gate makes its artifact usable."""

from __future__ import annotations

from rlhf_operator.api.training_status import WaiverStatus
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, SERVICE
from rlhf_operator.kinds.training.decisions import waiver
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.objects import later
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_trainer.wire import FailureClass


def retire(draft: Draft) -> None:
    _waive(draft)
    ended_at, ttl = draft.status.completion_time, draft.job.spec.ttl_seconds_after_finished
    if ended_at is None or ttl is None:
        return
    expires_at = later(ended_at, ttl)
    draft.wake(expires_at)
    if expires_at > draft.now:
        return
    for resource in (JOB, SERVICE, CONFIG_MAP):
        for child in draft.job.children(resource.kind):
            draft.delete(resource, child)


def _waive(draft: Draft) -> None:
    """Bound to the digest that was looked at; another artifact needs another decision."""
    last, artifact = draft.last, draft.status.artifact
    if last is None or artifact is None or draft.status.waiver is not None:
        return
    if last.failure_class != FailureClass.GATE_FAILED or last.action != "Fail":
        return
    decision = waiver(draft.job, artifact.digest)
    if decision is None:
        return
    draft.set(waiver=WaiverStatus(decision=decision.name, by=decision.spec.by, digest=artifact.digest))
    draft.edit(last, action="Complete")
    draft.ended = (Reason.WAIVED, f"{decision.spec.by} waived the gate by Decision {decision.name}")
