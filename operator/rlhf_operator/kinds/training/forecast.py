"""Which limit will end a running attempt before its last step, at its present pace: told while there is time to act.

Judged from the status alone, as of the last report that was written: what moved by itself would be a write at rest.
"""

from __future__ import annotations

from datetime import datetime

from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.limits import limits_of
from rlhf_operator.kinds.training.reasons import Reason

_SLACK = 0.05  # of the time that is left: a pace is an estimate, and a warning that comes and goes is none
_REMEDY = {
    Reason.DEADLINE_EXCEEDED: "suspend the job to raise spec.activeDeadlineSeconds",
    Reason.BUDGET_EXHAUSTED: "suspend the job to raise spec.budget",
}


def foreseen(draft: Draft, reason: Reason) -> str | None:
    """In words: the first limit of this reason that strikes before the last step; None: no limit does."""
    attempt, progress = draft.open, draft.status.progress
    if attempt is None or progress is None or progress.attempt != attempt.number or progress.expected_end_at is None:
        return None
    seen, ends = progress.reported_at, progress.expected_end_at
    latest = ends - _SLACK * (ends - seen)
    limits = limits_of(draft.job.spec, draft.status, seen, draft.size, draft.cost_per_hour)
    early = [(limit.at, limit.stop) for limit in limits if limit.stop.reason is reason and limit.at is not None]
    strikes, stop = min(early, key=lambda each: each[0], default=(None, None))
    if strikes is None or stop is None or strikes >= latest:
        return None
    return (
        f"at its present pace attempt {attempt.number} takes its last step at {_minute(ends)}, but at "
        f"{_minute(strikes)} {stop.message}: {_REMEDY[reason]}"
    )


def _minute(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%MZ")
