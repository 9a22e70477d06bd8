"""The plan of a PolicyRollout: one pure pass from what is observed to what shall be.

course     which revision is stable, which is tried      (ledger, spec, decisions)
evidence   what the gateways counted
ramp       stay, next stage, promote or reject
route      the gateway's configuration that follows, and what nothing is routed to any more
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

from pydantic import ValidationError

from rlhf_gateway.wire import TRAFFIC_PORT, GatewayConfig
from rlhf_operator.api.conditions import RolloutCondition, find, set_condition
from rlhf_operator.api.policy_rollout import PolicyRollout, seconds
from rlhf_operator.api.policy_rollout_status import (
    PolicyRolloutStatus,
    Revision,
    RevisionState,
    RolloutPhase,
    RolloutReason,
    RolloutVerdict,
    Weights,
)
from rlhf_operator.kinds.base import Event, Observed, Plan
from rlhf_operator.kinds.policy_rollout import course as courses
from rlhf_operator.kinds.policy_rollout import evidence, gateway, ledger, route, servers
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


def plan(observed: Observed) -> Plan:
    try:
        rollout = PolicyRollout.model_validate(dict(observed.primary))
    except ValidationError as error:
        return _unreadable(observed, error)
    view = View(observed, rollout, rollout.status or PolicyRolloutStatus())
    policy = courses.desired(view)
    done = _decided(view, _noticed(view, courses.steered(view, courses.recorded(view), policy)))
    return _written(
        done, policy if isinstance(policy, str) else None, None if isinstance(policy, str) else policy.digest
    )


def _noticed(view: View, course: Course) -> Course:
    """With the moment noted at which a revision first had a pod that answers."""
    for entry in (course.stable, course.candidate):
        if entry is not None and entry.available_at is None and view.ready_endpoints(entry.revision):
            revisions = ledger.replaced(course.revisions, entry, ledger.changed(entry, available_at=view.now))
            course = replace(course, revisions=revisions)
    return course


def _decided(view: View, course: Course) -> Pass:
    stable, candidate = course.stable, course.candidate
    before = evidence.recorded(view, course.trial)
    if stable is None or candidate is None:
        return Pass(view, course, before, None, None, verdicts=list(view.status.verdicts))
    course = _timed(view, course, stable, candidate)
    ramp = Ramp(
        view=view,
        course=course,
        candidate=candidate,
        blind_since=route.blind_since(view, view.status.blind_since),
        route_confirmed=course.stage_started_at is not None
        and route.confirmed(view, gateway.numbered(view, _config(view, course, candidate, routed=True))),
    )
    after = evidence.gathered(view, before, stable, candidate, min(course.stage or 0, len(view.spec.stages) - 1))
    found, standing, pending = _worth_writing(view, ramp, before, after)
    same = found is before and (course.trial, course.stage) == (view.status.trial, view.status.stage)
    verdicts = list(view.status.verdicts) if same and view.status.verdicts else ramp.verdicts(found)
    moved = _moved(view, course, ramp, verdicts, standing)
    return Pass(view, moved, found, ramp, standing, pending, verdicts)


def _timed(view: View, course: Course, stable: Revision, candidate: Revision) -> Course:
    """With the moment noted from which the gateways have acted on this stage."""
    if course.stage is None or course.stage_started_at is not None:
        return course
    config = gateway.numbered(view, gateway.wished(view, course.trial, stable, candidate, _index(view, course)))
    return replace(course, stage_started_at=view.now) if route.confirmed(view, config) else course


def _worth_writing(
    view: View, ramp: Ramp, before: Evidence, after: Evidence
) -> tuple[Evidence, Standing, float | None]:
    """New counts at once when they decide something, else every few seconds: the gateways keep them meanwhile."""
    fresh = ramp.standing(after)
    if after is before:
        return before, fresh, None
    stale = ramp.standing(before)
    guardrails = view.spec.guardrails
    decisive = (fresh.move, fresh.reason) != (stale.move, stale.reason) or (
        evidence.states(after.trial, guardrails) != evidence.states(before.trial, guardrails)
    )
    due = before.updated_at + evidence.WRITE_EVERY if before.updated_at is not None else view.now
    if decisive or view.now >= due:
        return after, fresh, None
    return before, stale, (due - view.now).total_seconds()


def _moved(view: View, course: Course, ramp: Ramp, verdicts: list[RolloutVerdict], standing: Standing) -> Course:
    """The course after the step that the standing asks for."""
    candidate = ramp.candidate
    if standing.move == "stay":
        return course
    noted = ledger.changed(candidate, verdicts=verdicts)
    if (approval := ramp.approved_by()) is not None and standing.approval:
        noted = ledger.changed(noted, approvals=[*noted.approvals, approval])
    if standing.move == "next":
        stage = 0 if course.stage is None else course.stage + 1
        noted = ledger.changed(noted, stage_reached=min(stage, len(view.spec.stages) - 1))
        revisions = ledger.replaced(course.revisions, candidate, noted)
        promoting = stage >= len(view.spec.stages)  # the route stays that of the last stage
        started = course.stage_started_at if promoting else None
        return replace(course, revisions=revisions, stage=stage, stage_started_at=started)
    course = replace(course, revisions=ledger.replaced(course.revisions, candidate, noted))
    if standing.move == "reject":
        return courses.rejected(view, course, standing.reason, standing.message)
    retain = timedelta(seconds=seconds(view.spec.rollback.retain_stable))
    revisions = ledger.promoted(course.revisions, noted, retain, view.now)
    return replace(course, revisions=revisions, stage=None, stage_started_at=None)


def _index(view: View, course: Course) -> int | None:
    return None if course.stage is None else min(course.stage, len(view.spec.stages) - 1)


def _config(view: View, course: Course, candidate: Revision | None, routed: bool) -> GatewayConfig:
    stage = _index(view, course) if routed and candidate is not None else None
    return gateway.wished(view, course.trial, course.stable, candidate, stage)


def _written(done: Pass, waiting: str | None, digest: str | None) -> Plan:
    view, course, standing = done.view, done.course, done.standing
    routed = standing is not None and standing.move in ("stay", "next") and (standing.routed or standing.move == "next")
    config = gateway.numbered(view, _config(view, course, course.candidate, routed))
    live = {entry.revision: entry for entry in course.revisions if entry.state in _LOADED}
    programmed = route.confirmed(view, config)
    situation = _situation(done, set(live), programmed, waiting, digest)
    status = _status(done, situation, config)
    applied = [
        child
        for entry in live.values()
        for child in (servers.deployment(view, entry, _replicas(done, entry)), servers.service(view, entry))
    ]
    return Plan(
        status=status.to_dict(),
        delete=tuple(route.removals(view, config, set(live))),
        apply=(*gateway.children(view, config), *applied),
        events=tuple(_events(view, situation)),
        pulls=route.pulls(view, busy=course.candidate is not None or not programmed or standing is not None),
        requeue_after=_requeue(done),
        # The record first: a route that no record explains would be taken back by a new process.
        status_first=course != courses.recorded(view),
    )


_LOADED = (RevisionState.STABLE, RevisionState.CANDIDATE, RevisionState.RETAINED)


def _replicas(done: Pass, entry: Revision) -> int:
    serving, course = done.view.spec.serving, done.course
    if entry.state is not RevisionState.CANDIDATE:
        return serving.replicas
    promoting = course.stage is not None and course.stage >= len(done.view.spec.stages)
    return max(serving.replicas, serving.canary_replicas) if promoting else serving.canary_replicas


def _situation(done: Pass, live: set[str], programmed: bool, waiting: str | None, digest: str | None) -> Situation:
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
            return RolloutPhase.ROLLING_BACK, RolloutReason(refused.reason or RolloutReason.DIGEST_REJECTED), message
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
    reason = RolloutReason(stable.reason or RolloutReason.PROMOTED)
    if view.status.phase is RolloutPhase.PENDING and not programmed:
        return RolloutPhase.PENDING, reason, f"{stable.revision} is ready; waiting for a gateway pod that sends to it"
    if waiting is not None:
        return RolloutPhase.HEALTHY, RolloutReason.WAITING_FOR_UPSTREAM, waiting
    if reason is RolloutReason.PROMOTED and not programmed:
        return RolloutPhase.PROMOTING, reason, f"{stable.revision} is stable; the gateways are taking it up"
    return RolloutPhase.HEALTHY, reason, f"{stable.revision} is stable"


def _status(done: Pass, situation: Situation, config: GatewayConfig) -> PolicyRolloutStatus:
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


def _events(view: View, situation: Situation) -> Iterator[Event]:
    """One for every change of what is going on; messages with counts alone make none."""
    before = find(view.status.conditions, RolloutCondition.PROGRESSING)
    was = (before.reason if before is not None else None, view.status.phase, view.status.stage)
    now = (str(situation.reason), situation.phase, situation.course.stage)
    if was != now:
        bad = situation.reason in _WARNINGS
        yield Event("Warning" if bad else "Normal", str(situation.reason), situation.message[:1024])


def _requeue(done: Pass) -> float | None:
    view = done.view
    waits = [done.pending]
    if done.standing is not None:
        waits += [done.standing.wait, route.blind_check(view)]
    for entry in ledger.retained(done.course.revisions):
        if entry.retained_until is not None:
            waits.append((entry.retained_until - view.observed.now).total_seconds())
    return min((max(0.1, wait) for wait in waits if wait is not None), default=None)


def _unreadable(observed: Observed, error: ValidationError) -> Plan:
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
