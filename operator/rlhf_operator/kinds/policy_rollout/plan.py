"""The plan of a PolicyRollout: one pure pass from what is observed to what shall be.

course     which revision is stable, which is tried      (ledger, spec, decisions)
evidence   what the gateways counted
ramp       stay, next stage, promote or reject
route      the gateway's configuration that follows, and what nothing is routed to any more
telling    status and events: how the pass is told
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from pydantic import ValidationError

from rlhf_gateway.wire import GatewayConfig
from rlhf_operator.api.policy_rollout import PolicyRollout, seconds
from rlhf_operator.api.policy_rollout_status import (
    PolicyRolloutStatus,
    Revision,
    RevisionState,
    RolloutVerdict,
)
from rlhf_operator.kinds.base import Observed, Plan
from rlhf_operator.kinds.policy_rollout import course as courses
from rlhf_operator.kinds.policy_rollout import evidence, gateway, ledger, route, servers
from rlhf_operator.kinds.policy_rollout.course import Course
from rlhf_operator.kinds.policy_rollout.evidence import Evidence
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.policy_rollout.ramp import Ramp, Standing
from rlhf_operator.kinds.policy_rollout.telling import Pass, events_of, situation_of, status_of, unreadable


def plan(observed: Observed) -> Plan:
    try:
        rollout = PolicyRollout.model_validate(dict(observed.primary))
    except ValidationError as error:
        return unreadable(observed, error)
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
    situation = situation_of(done, set(live), programmed, waiting, digest)
    status = status_of(done, situation, config)
    applied = [
        child
        for entry in live.values()
        for child in (servers.deployment(view, entry, _replicas(done, entry)), servers.service(view, entry))
    ]
    return Plan(
        status=status.to_dict(),
        delete=tuple(route.removals(view, config, set(live))),
        apply=(*gateway.children(view, config), *applied),
        events=tuple(events_of(view, situation)),
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


def _requeue(done: Pass) -> float | None:
    view = done.view
    waits = [done.pending, route.parting_check(view)]
    if done.standing is not None:
        waits += [done.standing.wait, route.blind_check(view)]
    for entry in ledger.retained(done.course.revisions):
        if entry.retained_until is not None:
            waits.append((entry.retained_until - view.observed.now).total_seconds())
    return min((max(0.1, wait) for wait in waits if wait is not None), default=None)
