"""How one pass of a PolicyRollout is told: its status, its events, and what a user reads while nothing is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from rlhf_gateway.wire import TRAFFIC_PORT, GatewayConfig
from rlhf_operator.api.conditions import RolloutCondition, find, set_condition
from rlhf_operator.api.policy_rollout_status import (
    PolicyRolloutStatus,
    Revision,
    RolloutPhase,
    RolloutReason,
    RolloutVerdict,
    Weights,
)
from rlhf_operator.kinds.base import Event, Observed, Plan
from rlhf_operator.kinds.policy_rollout import ledger, route
from rlhf_operator.kinds.policy_rollout.conditions import Situation, conditions
from rlhf_operator.kinds.policy_rollout.course import Course
from rlhf_operator.kinds.policy_rollout.evidence import Evidence
from rlhf_operator.kinds.policy_rollout.observe import View, gateway_name
from rlhf_operator.kinds.policy_rollout.ramp import Ramp, Standing
from rlhf_operator.kinds.training.objects import integer, mapping

_WARNINGS = frozenset(
    {
        RolloutReason.GUARDRAIL_CROSSED,
        RolloutReason.CANDIDATE_UNAVAILABLE,
        RolloutReason.SPLIT_MISMATCH,
        RolloutReason.METRICS_BLIND,
        RolloutReason.DIGEST_REJECTED,
        RolloutReason.ABORTED_BY_DECISION,
        RolloutReason.INVALID_DATA,
    }
)


@dataclass(frozen=True)
class Pass:
    """What one pass decided, before it is written down."""

    view: View
    course: Course
    evidence: Evidence
    ramp: Ramp | None  # of the candidate that this pass began with
    standing: Standing | None
    pending: float | None = None  # seconds until counts that decide nothing are due to be written
    verdicts: list[RolloutVerdict] = field(default_factory=list)


def situation_of(done: Pass, live: set[str], programmed: bool, waiting: str | None, digest: str | None) -> Situation:
    view, course, standing = done.view, done.course, done.standing
    if standing is not None:
        phase, reason, message = standing.phase, standing.reason, standing.message
    else:
        phase, reason, message = _at_rest(done, live, programmed, waiting, digest)
    return Situation(
        view, course, phase, reason, message, programmed, done.verdicts, done.evidence.trial, done.ramp, standing
    )


def _at_rest(
    done: Pass, live: set[str], programmed: bool, waiting: str | None, digest: str | None
) -> tuple[RolloutPhase, RolloutReason, str]:
    """Phase, reason and message while no candidate is tried."""
    view, course = done.view, done.course
    stable = course.stable
    refused = ledger.rejection(course.revisions, digest) if digest is not None else None
    if refused is not None:
        message = f"{refused.digest} is refused: {refused.message}"
        if route.leftovers(view, live) or (not programmed and view.status.phase is not RolloutPhase.ROLLED_BACK):
            return RolloutPhase.ROLLING_BACK, _reason(refused, RolloutReason.DIGEST_REJECTED), message
        more = "; name another policy, or create a Decision ClearRejection with this digest"
        return RolloutPhase.ROLLED_BACK, RolloutReason.DIGEST_REJECTED, message + more
    if stable is None:
        return RolloutPhase.PENDING, RolloutReason.WAITING_FOR_UPSTREAM, waiting or "no policy yet"
    if stable.available_at is None:
        crash = view.crash_loop(stable.revision)
        if crash is not None:
            return RolloutPhase.FAILED, RolloutReason.CANDIDATE_UNAVAILABLE, f"the first revision cannot start: {crash}"
        message = f"the first revision {stable.revision} goes straight to stable once a pod is ready"
        return RolloutPhase.PENDING, RolloutReason.FIRST_REVISION, message
    reason = _reason(stable, RolloutReason.PROMOTED)
    if view.status.phase is RolloutPhase.PENDING and not programmed:
        return RolloutPhase.PENDING, reason, f"{stable.revision} is ready; waiting for a gateway pod that sends to it"
    if waiting is not None:
        return RolloutPhase.HEALTHY, RolloutReason.WAITING_FOR_UPSTREAM, waiting
    if reason is RolloutReason.PROMOTED and not programmed:
        return RolloutPhase.PROMOTING, reason, f"{stable.revision} is stable; the gateways are taking it up"
    return RolloutPhase.HEALTHY, reason, f"{stable.revision} is stable"


def _reason(entry: Revision, otherwise: RolloutReason) -> RolloutReason:
    """That of the ledger; a newer operator may have written one that is not known here."""
    return RolloutReason(entry.reason) if entry.reason in set(RolloutReason) else otherwise


def status_of(done: Pass, situation: Situation, config: GatewayConfig) -> PolicyRolloutStatus:
    view, course, ramp = done.view, done.course, done.ramp
    live = view.live_config
    tried = course.candidate is not None
    number = ramp.number if ramp is not None else 0
    share = done.evidence.trial.observed_share(number) if ramp is not None and ramp.stage is not None else None
    endpoint = (
        f"http://{gateway_name(view.name)}.{view.namespace}.svc.{view.observed.settings.cluster_domain}:{TRAFFIC_PORT}"
    )
    return PolicyRolloutStatus(
        phase=situation.phase,
        conditions=conditions(situation),
        observed_generation=view.generation,
        stage=course.stage,
        stage_started_at=course.stage_started_at,
        stage_samples=done.evidence.trial.samples(number) if tried and course.stage is not None else None,
        trial=course.trial,
        trial_plan=course.trial_plan,
        weights=Weights(
            desired=config.canary_weight_percent,
            written=live.canary_weight_percent if live is not None else 0.0,
            observed=round(100.0 * share, 3) if share is not None and tried else None,
        ),
        generation=config.generation,
        family_wise_alpha=round(sum(g.alpha for g in view.spec.guardrails), 6) if tried else None,
        verdicts=situation.verdicts,
        revisions=list(course.revisions),
        blind_since=ramp.blind_since if ramp is not None and tried else None,
        evidence=done.evidence.to_json() if tried else {},
        endpoint=endpoint,
    )


def events_of(view: View, situation: Situation) -> Iterator[Event]:
    """One for every change of what is going on; messages with counts alone make none."""
    before = find(view.status.conditions, RolloutCondition.PROGRESSING)
    was = (before.reason if before is not None else None, view.status.phase, view.status.stage)
    now = (str(situation.reason), situation.phase, situation.course.stage)
    if was != now:
        bad = situation.reason in _WARNINGS
        yield Event("Warning" if bad else "Normal", str(situation.reason), situation.message[:1024])


def unreadable(observed: Observed, error: ValidationError) -> Plan:
    """A spec or status that this version cannot read: nothing is touched, and the object says so."""
    status = dict(mapping(observed.primary, "status"))
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = f"{where}: {problem['msg']}; correct the field. Until then everything stays as it is"
    try:
        before = PolicyRolloutStatus.model_validate({"conditions": status.get("conditions") or []}).conditions
    except ValidationError:
        before = []
    said = set_condition(
        before,
        RolloutCondition.DEGRADED,
        True,
        RolloutReason.INVALID_DATA,
        message,
        generation=integer(observed.primary, "metadata", "generation") or 0,
        now=observed.now,
    )
    status["conditions"] = [entry.to_dict() for entry in said]
    status.setdefault("phase", RolloutPhase.FAILED.value)
    return Plan(status=status, events=(Event("Warning", RolloutReason.INVALID_DATA, message[:1024]),))
