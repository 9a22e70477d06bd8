"""The life of a training job, as one pure function that both kinds share."""

from __future__ import annotations

from typing import Any

from rlhf_operator.kinds.base import Observed, Plan
from rlhf_operator.kinds.training.closing import close_attempt
from rlhf_operator.kinds.training.concluding import conclude, refuse
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.events import events_of
from rlhf_operator.kinds.training.job import Job, JobKind
from rlhf_operator.kinds.training.objects import deleting, mapping
from rlhf_operator.kinds.training.retiring import retire
from rlhf_operator.kinds.training.starting import adopt_children, clean_up, go_on
from rlhf_operator.kinds.training.stopping import stop_attempt
from rlhf_operator.kinds.training.watching import watch_attempt


def plan(kind: JobKind[Any], observed: Observed) -> Plan:
    """What shall be, from what is: total, deterministic, and at rest once it has got what it asked for."""
    job = Job.read(kind, observed)
    draft = Draft(job, job.status)
    if deleting(observed.primary):
        return Plan(status=mapping(observed.primary, "status"))  # the garbage collector does the rest
    if job.problem:
        refuse(draft, job.problem)
        return draft.plan(events_of(job, draft))
    if job.status.completion_time is not None:
        retire(draft)
    else:
        adopt_children(draft)
        watch_attempt(draft)
        stop_attempt(draft)
        close_attempt(draft)
        go_on(draft)
        clean_up(draft)
    conclude(draft)
    return draft.plan(events_of(job, draft))
