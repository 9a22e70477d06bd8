"""When the operator ends an attempt itself: the reason goes into the ledger, then the Job is deleted."""

from __future__ import annotations

import json

from rlhf_operator.api.training_status import Attempt
from rlhf_operator.kinds.base import CONFIG_MAP, JOB
from rlhf_operator.kinds.training.closing import outcome_is_known
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.limits import Stop
from rlhf_operator.kinds.training.objects import integer, text
from rlhf_operator.kinds.training.progress import report_of
from rlhf_operator.kinds.training.reasons import Reason


def stop_attempt(draft: Draft) -> None:
    attempt = draft.open
    if attempt is None:
        return
    if attempt.stopping is None and not outcome_is_known(draft, attempt):
        stop = _wish(draft, attempt)
        if stop is not None:
            draft.edit(
                attempt,
                stopping=str(stop.reason),
                reason=str(stop.reason),
                message=stop.message,
                action=stop.action,
                failed_at=None,
                failure_class=None,
                exit_code=None,
            )
            draft.pulls.clear()
    job = draft.job.child(JOB.kind, draft.job.attempt_name(attempt.number))
    if draft.open is not None and draft.open.stopping is not None and job is not None:
        draft.delete(JOB, job)


def _wish(draft: Draft, attempt: Attempt) -> Stop | None:
    """The first reason to stop, from the user's to the clock's."""
    if draft.job.spec.suspend:
        return Stop(Reason.SUSPENDED, "spec.suspend is set", "Suspend")
    if (mismatch := _mismatch(draft, attempt)) is not None:
        return mismatch
    limits = draft.limits()
    struck = next((limit.stop for limit in limits if limit.struck(draft.now)), None)
    if struck is None:
        for limit in limits:
            draft.wake(limit.at)
    return struck


def _mismatch(draft: Draft, attempt: Attempt) -> Stop | None:
    """A launcher that ignores PET_* trains silently on its own: restarting it would not help."""
    reports = (report_of(draft.job, attempt, pull) for pull in draft.pulls)
    report = next((found for found in reports if found is not None), None)
    expected = draft.size.world_size
    if report is None or report.body.world_size in (expected, _configured(draft, attempt)):
        return None
    message = (
        f"rank 0 reports a world size of {report.body.world_size}, but {draft.size.nodes} pods with "
        f"{draft.size.processes} processes each make {expected}: does the command of podTemplate or the image ignore "
        "the PET_* variables?"
    )
    return Stop(Reason.RENDEZVOUS_MISMATCH, message, "Fail")


def _configured(draft: Draft, attempt: Attempt) -> int | None:
    """The world size that the pods were started for: a podTemplate that changed since, and is refused, or an operator
    that counts otherwise, says what the next attempt would have."""
    config = draft.job.child(CONFIG_MAP.kind, draft.job.attempt_name(attempt.number))
    try:
        return integer(json.loads(text(config, "data", "attempt.json")), "worldSize")
    except (ValueError, RecursionError):
        return None
