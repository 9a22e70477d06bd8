"""Human verbs: which Decision answers a paused guardrail, and which one a gate. The engine passes only honoured ones.

An Abort is no verb of a job: `spec.suspend` is the standing wish to stop, deleting the job the final one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rlhf_operator.api.decision import Action, Decision, readable
from rlhf_operator.kinds.training.job import Job
from rlhf_operator.kinds.training.objects import moment


def acknowledgement(job: Job[Any], attempt: int, since: datetime) -> Decision | None:
    """Lets a paused job go on: names the attempt, and was made after the pause."""
    return next(
        (d for d in _decisions(job, since) if d.spec.action is Action.ACKNOWLEDGE and d.spec.attempt == attempt), None
    )


def waiver(job: Job[Any], digest: str) -> Decision | None:
    """Accepts an artifact that its gate refused, or could not decide on: bound to the artifact's digest."""
    return next((d for d in _decisions(job, job.created_at) if _waives(d, digest)), None)


def _waives(decision: Decision, digest: str) -> bool:
    return decision.spec.action is Action.WAIVE and decision.spec.digest == digest


def _decisions(job: Job[Any], since: datetime | None) -> tuple[Decision, ...]:
    """In force, and not older than what they are about: a namesake's decisions are not this job's."""
    found = readable(job.observed.decisions, job.now)
    return tuple(decision for decision in found if since is None or _made_after(decision, since))


def _made_after(decision: Decision, since: datetime) -> bool:
    made = moment({"metadata": decision.metadata}, "metadata", "creationTimestamp")
    return made is not None and made >= since.replace(microsecond=0)  # Kubernetes gives whole seconds
