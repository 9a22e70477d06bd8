"""The conditions of a rollout: each one sentence about the world, derived and never remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_operator.analysis.trial import Trial
from rlhf_operator.api.conditions import RolloutCondition, remove_condition, set_condition
from rlhf_operator.api.meta import ConditionStatus
from rlhf_operator.api.policy_rollout_status import RolloutMetric, RolloutPhase, RolloutReason, RolloutVerdict
from rlhf_operator.kinds.policy_rollout import evidence
from rlhf_operator.kinds.policy_rollout.course import Course
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.policy_rollout.ramp import Ramp, Standing
from rlhf_trainer.wire import VerdictState


class Said(NamedTuple):
    type: RolloutCondition
    status: bool | None
    reason: str
    message: str


@dataclass(frozen=True)
class Situation:
    """Everything this pass found."""

    view: View
    course: Course
    phase: RolloutPhase
    reason: RolloutReason
    message: str
    programmed: bool
    verdicts: list[RolloutVerdict]
    trial: Trial
    ramp: Ramp | None
    standing: Standing | None


def conditions(situation: Situation) -> list[ConditionStatus]:
    """All of them, in a fixed order; those about a candidate only while there is one."""
    view = situation.view
    said = {entry.type: entry for entry in _said(situation)}
    kept = list(view.status.conditions)
    for type in RolloutCondition:
        entry = said.get(type)
        if entry is None:
            kept = remove_condition(kept, type)
        else:
            kept = set_condition(
                kept, type, entry.status, entry.reason, entry.message, generation=view.generation, now=view.now
            )
    order = list(RolloutCondition)
    return sorted(kept, key=lambda c: order.index(RolloutCondition(c.type)) if c.type in order else len(order))


def _said(situation: Situation) -> Iterator[Said]:
    view, course = situation.view, situation.course
    stable = course.stable
    serving = view.ready_endpoints(stable.revision) if stable is not None else 0
    wanted = view.spec.serving.replicas
    gateways = sum(pod.ready for pod in view.gateway_pods)
    ready = serving > 0 and gateways > 0
    yield Said(
        RolloutCondition.READY,
        ready,
        "Serving" if ready else "NotServing",
        f"{stable.revision} is served"
        if ready and stable is not None
        else f"{gateways} gateway pods and {serving} pods of the stable revision are ready: both are needed",
    )
    yield Said(RolloutCondition.PROGRESSING, situation.standing is not None, situation.reason, situation.message)
    if stable is not None:
        yield Said(
            RolloutCondition.STABLE_AVAILABLE,
            serving > 0,
            "Available" if serving else "Unavailable",
            f"{serving} of {wanted} pods of {stable.revision} are ready",
        )
    yield Said(
        RolloutCondition.ROUTE_PROGRAMMED,
        situation.programmed,
        "Programmed" if situation.programmed else "Programming",
        "every gateway pod acts on the newest configuration"
        if situation.programmed
        else "waiting for gateway pods to act on the newest configuration",
    )
    if situation.ramp is not None and situation.standing is not None:
        yield from _about_candidate(situation, situation.ramp, situation.standing)
    yield _degraded(situation, serving)


def _about_candidate(situation: Situation, ramp: Ramp, standing: Standing) -> Iterator[Said]:
    view, candidate = situation.view, ramp.candidate
    pods = view.ready_endpoints(candidate.revision)
    yield Said(
        RolloutCondition.CANDIDATE_AVAILABLE,
        pods > 0,
        "Available" if pods else RolloutReason.CANDIDATE_UNAVAILABLE,
        f"{pods} pods of {candidate.revision} are ready",
    )
    yield _split(situation, ramp)
    seen = ramp.blind_since is None
    yield Said(
        RolloutCondition.METRICS_AVAILABLE,
        seen,
        "Read" if seen else RolloutReason.METRICS_BLIND,
        "every gateway pod's counts are read" if seen else "counts of gateway pods are out of reach",
    )
    safety = next((v for v in situation.verdicts if v.metric is RolloutMetric.SAFETY), None)
    if safety is not None:
        known = {VerdictState.PASS: True, VerdictState.FAIL: False}
        yield Said(RolloutCondition.SAFETY_OK, known.get(safety.state), safety.state, safety.message)
    if standing.approval is not None:
        yield Said(
            RolloutCondition.APPROVED,
            standing.approval,
            "Approved" if standing.approval else RolloutReason.AWAITING_DECISION,
            ramp.approved_by() or standing.message,
        )


def _split(situation: Situation, ramp: Ramp) -> Said:
    design = evidence.designs(situation.view, situation.course.trial).get(ramp.number)
    share = situation.trial.observed_share(ramp.number)
    if design is None or share is None:
        return Said(RolloutCondition.SPLIT_VERIFIED, None, "NoTraffic", "no conversation was counted in this stage yet")
    wrong = situation.trial.split_mismatch(ramp.number, design)
    return Said(
        RolloutCondition.SPLIT_VERIFIED,
        not wrong,
        RolloutReason.SPLIT_MISMATCH if wrong else "AsConfigured",
        f"{100.0 * share:.3g} % of the counted conversations are the candidate's, {100.0 * design.share:g} % expected",
    )


def _degraded(situation: Situation, serving: int) -> Said:
    stable, standing = situation.course.stable, situation.standing
    if situation.phase in (RolloutPhase.ROLLING_BACK, RolloutPhase.ROLLED_BACK, RolloutPhase.FAILED):
        return Said(RolloutCondition.DEGRADED, True, situation.reason, situation.message)
    if stable is not None and stable.available_at is not None and serving == 0:
        return Said(RolloutCondition.DEGRADED, True, "Unavailable", f"no pod of the stable {stable.revision} is ready")
    held = (RolloutReason.METRICS_BLIND, RolloutReason.SPLIT_MISMATCH, RolloutReason.CANDIDATE_UNAVAILABLE)
    if standing is not None and standing.reason in held and situation.course.stage is not None:
        return Said(RolloutCondition.DEGRADED, True, standing.reason, standing.message)
    return Said(RolloutCondition.DEGRADED, False, "AsWished", "nothing is wrong")
