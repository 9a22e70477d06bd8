"""Which revision is stable, which is tried: what follows from the policy that the spec names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import ValidationError

from rlhf_operator.api.decision import Action, Decision
from rlhf_operator.api.meta import ClaimSource
from rlhf_operator.api.policy_rollout_status import Revision, RevisionState, RolloutReason
from rlhf_operator.kinds.base import Key
from rlhf_operator.kinds.policy_rollout import ledger
from rlhf_operator.kinds.policy_rollout.decisions import decision_about
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.training.objects import is_true, mapping, text
from rlhf_trainer.wire import digest_of

UPSTREAM = "PolicyOptimizationJob"


@dataclass(frozen=True)
class Course:
    """The part of the status that decides what is routed: the record, of which routes are outputs."""

    revisions: ledger.Revisions
    trial: int
    trial_plan: str | None
    stage: int | None  # None: not begun; len(stages): all passed, being promoted
    stage_started_at: datetime | None

    @property
    def stable(self) -> Revision | None:
        return ledger.stable(self.revisions)

    @property
    def candidate(self) -> Revision | None:
        return ledger.candidate(self.revisions)


def recorded(view: View) -> Course:
    status = view.status
    stage = None if status.stage is None else max(0, status.stage)
    return Course(tuple(status.revisions), status.trial, status.trial_plan, stage, status.stage_started_at)


def desired(view: View) -> ClaimSource | str:
    """The policy that shall be served, or in words what it waits for."""
    policy = view.spec.policy
    if policy.uri is not None and policy.digest is not None:
        return ClaimSource(uri=policy.uri, digest=policy.digest)
    name = policy.job_ref.name if policy.job_ref is not None else ""
    job = view.observed.related.get(Key(UPSTREAM, view.namespace, name))
    if job is None:
        return f"waiting for {UPSTREAM} {name!r}: it does not exist in namespace {view.namespace!r}"
    if not is_true(job, "Complete"):
        return f"waiting for {UPSTREAM} {name!r}: it is {text(job, 'status', 'phase') or 'Pending'}"
    try:
        return ClaimSource.model_validate(dict(mapping(job, "status", "artifact")))
    except ValidationError:
        return f"waiting for {UPSTREAM} {name!r}: it is complete, but its status names no artifact"


def steered(view: View, course: Course, policy: ClaimSource | str) -> Course:
    """The course after the spec, the ledger's clocks and the people have been heard."""
    course = replace(course, revisions=ledger.expired(course.revisions, view.now))
    if isinstance(policy, str):
        return _tried(view, course)
    revisions = _cleared(view, ledger.forgiven(course.revisions, policy.digest))
    course = replace(course, revisions=ledger.located(revisions, policy))
    stable, candidate = course.stable, course.candidate
    if candidate is not None and policy.digest == candidate.digest:
        return _tried(view, course)
    if candidate is not None:
        message = f"replaced: the spec now names {policy.digest}"
        course = _without_candidate(
            course, candidate, RevisionState.SUPERSEDED, RolloutReason.SUPERSEDED, message, view
        )
    if stable is not None and policy.digest == stable.digest:
        return course
    if stable is not None and stable.available_at is None:  # never served anyone: nothing to compare with
        message = f"replaced before it was ever available: the spec now names {policy.digest}"
        ended = ledger.ended(
            course.revisions, stable, RevisionState.SUPERSEDED, RolloutReason.SUPERSEDED, message, view.now
        )
        course, stable = replace(course, revisions=ended), None
    if stable is None:
        return _entered(view, course, policy, RevisionState.STABLE)
    if ledger.rejection(course.revisions, policy.digest) is not None:
        return course
    return _entered(view, course, policy, RevisionState.CANDIDATE)


def rejected(view: View, course: Course, reason: RolloutReason, message: str) -> Course:
    """The course without its candidate, whose digest is refused from now on."""
    candidate = course.candidate
    if candidate is None:
        return course
    return _without_candidate(course, candidate, RevisionState.REJECTED, reason, message, view)


def trial_plan(view: View) -> str:
    """Digest of what the trial was announced to be: to change it while looking at the data would be peeking."""
    spec = view.spec
    # Without what nobody set: an operator that knows a field more must not take the plan for another one.
    return digest_of(
        {
            "stages": [stage.model_dump(mode="json") for stage in spec.stages],
            "guardrails": [guardrail.model_dump(mode="json", exclude_none=True) for guardrail in spec.guardrails],
        }
    )


def _entered(view: View, course: Course, policy: ClaimSource, state: RevisionState) -> Course:
    trial = course.trial + 1 if state is RevisionState.CANDIDATE else course.trial
    image = view.observed.settings.trainer_image
    revisions = ledger.started(course.revisions, view.name, policy, state, image, trial, view.now)
    return Course(revisions, trial, trial_plan(view), None, None)


def _tried(view: View, course: Course) -> Course:
    """The candidate goes on, under the plan that was announced or else from the start."""
    candidate = course.candidate
    if candidate is None or course.trial_plan == trial_plan(view):
        return course
    return _restarted(view, course, candidate)


def _restarted(view: View, course: Course, candidate: Revision) -> Course:
    """The same candidate under other stages or guardrails: fresh evidence, and old approvals are void."""
    again = ledger.changed(candidate, trial=course.trial + 1, started_at=view.now, stage_reached=None, approvals=[])
    revisions = ledger.replaced(course.revisions, candidate, again)
    return Course(revisions, course.trial + 1, trial_plan(view), None, None)


def _without_candidate(
    course: Course, candidate: Revision, state: RevisionState, reason: RolloutReason, message: str, view: View
) -> Course:
    revisions = ledger.ended(course.revisions, candidate, state, reason, message, view.now)
    return replace(course, revisions=revisions, stage=None, stage_started_at=None)


def _cleared(view: View, revisions: ledger.Revisions) -> ledger.Revisions:
    """With the rejections lifted that somebody cleared since."""

    def cleared(entry: Revision) -> Revision:
        if entry.state is not RevisionState.REJECTED:
            return entry
        decision = decision_about(view, Action.CLEAR_REJECTION, entry.digest, since=entry.finished_at)
        if decision is None:
            return entry
        return ledger.changed(entry, state=RevisionState.RETIRED, cleared_by=_signature(decision))

    return tuple(cleared(entry) for entry in revisions)


def _signature(decision: Decision) -> str:
    return f"{decision.spec.by} ({decision.name})"[:256]
