"""The plan of a PolicyRollout on the way down: what sends a candidate out, and what a rollback leaves."""

from __future__ import annotations

import copy
from datetime import timedelta

from rlhf_operator.kinds.base import Pulled
from tests.unit.rollout_world import (
    A_NAME,
    B_NAME,
    SAFETY_ONLY,
    STAGES,
    A,
    B,
    names,
    source,
    trying,
)


def test_a_leaking_candidate_is_rolled_back_with_the_test_n_and_the_bound() -> None:
    world = trying(stages=STAGES[1:])
    world.until("RolledBack", canary_bad=0.5, stable_bad=0.05)
    entry = world.entry(B)
    assert (entry["state"], entry["reason"]) == ("Rejected", "GuardrailCrossed")
    assert "safetyViolationRate in stage 0" in entry["message"]
    assert "conditional binomial e-process reached 100" in entry["message"]
    verdict = next(v for v in entry["verdicts"] if v["metric"] == "safetyViolationRate")
    assert verdict["state"] == "Fail"
    assert verdict["eValue"] >= verdict["bound"] == 100
    assert 5 < verdict["n"] < 100
    assert (world.config.canary, world.config.canary_weight_percent) == (None, 0.0)
    assert B_NAME not in names(world, "Deployment") | names(world, "Service")
    assert world.condition("Degraded")["reason"] == "DigestRejected"


def test_a_rollback_that_is_over_stays_over_while_a_gateway_restarts() -> None:
    world = trying(stages=STAGES[1:])
    world.until("RolledBack", canary_bad=0.5)
    for gateway in world.gateways.values():
        gateway.config = None
    world.follow = False
    world.pull()
    world.settle()
    assert world.condition("RouteProgrammed")["status"] == "False"
    assert world.status["phase"] == "RolledBack"


def test_failing_answers_roll_back_by_availability() -> None:
    world = trying(stages=STAGES[1:])
    world.until("RolledBack", canary_failed=0.3)
    assert "availability in stage 0" in world.entry(B)["message"]


def test_slow_answers_roll_back_by_the_share_above_stables_percentile() -> None:
    world = trying(stages=STAGES[1:])
    world.until("RolledBack", canary_slow=0.5)
    assert "latencyP95 in stage 0" in world.entry(B)["message"]
    assert "slower than stable's 95th percentile" in world.entry(B)["message"]


def test_answers_within_the_promised_limit_are_never_slow() -> None:
    """The slow ones take 50 to 100 ms, in histograms whose bounds those are."""
    for limit, phase in (("50ms", "RolledBack"), ("75ms", "Healthy"), ("100ms", "Healthy")):
        guardrails = [*SAFETY_ONLY, {"metric": "latencyP95", "margin": 0.1, "limit": limit}]
        world = trying(stages=STAGES[1:], guardrails=guardrails)
        world.until(phase, canary_slow=0.5)
        assert world.entry(B)["state"] == ("Stable" if phase == "Healthy" else "Rejected")
        (verdict,) = [v for v in world.entry(B)["verdicts"] if v["metric"] == "latencyP95"]
        assert f"slower than stable's 95th percentile and than {limit}" in verdict["message"]


def test_the_route_is_confirmed_at_zero_before_the_pods_go() -> None:
    world = trying(stages=STAGES[1:])
    world.follow = False  # the gateways are slow to take up what is written
    world.gateways_follow()
    world.pull()
    world.settle()
    world.until("RollingBack", canary_bad=0.5)
    assert world.config.canary is None
    assert B_NAME in names(world, "Deployment")
    world.run(5, per_second=0)
    assert B_NAME in names(world, "Deployment")
    world.follow = True
    for gateway in world.gateways.values():
        gateway.in_flight = {B_NAME: 2}
    world.run(2, per_second=0)
    assert world.status["phase"] == "RollingBack"
    assert B_NAME in names(world, "Deployment")  # two answers are still being given
    for gateway in world.gateways.values():
        gateway.in_flight = {}
    world.run(2, per_second=0)
    assert world.status["phase"] == "RolledBack"
    assert B_NAME not in names(world, "Deployment")


def test_a_gateway_on_a_lost_node_keeps_no_policy_loaded() -> None:
    """Its pod stays Terminating, and what it last said of answers in flight stays as it was."""
    world = trying()
    world.until("Progressing")
    world.decide("Abort", B)
    world.step()
    world.kubelet()
    world.pull()
    lost = copy.deepcopy(world.children["Pod", "desk-gateway-0"])
    ends = world.now + timedelta(seconds=60)
    lost["metadata"] |= {"name": "lost", "uid": "lost", "deletionTimestamp": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
    world.children["Pod", "lost"] = lost
    body = {**world.gateways["desk-gateway-0"].state(), "podUid": "lost", "inFlight": {B_NAME: 2}}
    world._pulled["state/lost"] = Pulled(body, world.now, "no route to host", world.now)
    world.step()
    assert B_NAME in names(world, "Deployment")  # it may be answering still
    waiting = world.plan
    world.now = ends
    world.step()
    assert B_NAME not in names(world, "Deployment")
    assert waiting is not None
    assert waiting.requeue_after == 60.0


def test_lost_endpoints_mean_weight_zero_in_the_very_pass() -> None:
    world = trying()
    world.until("Progressing")
    world.run(2)
    assert world.config.canary_weight_percent == 10.0
    world.broken.add(B_NAME)
    world.kubelet()
    world.step()
    assert (world.config.canary, world.config.canary_weight_percent) == (None, 0.0)
    assert world.condition("Progressing")["reason"] == "CandidateUnavailable"
    world.broken.clear()
    world.settle()
    assert world.config.canary_weight_percent == 10.0
    world.until("Healthy")


def test_a_crash_loop_is_a_rollback() -> None:
    world = trying()
    world.until("Progressing")
    world.crashing.add(B_NAME)
    world.kubelet()
    world.step()
    assert world.config.canary is None
    assert (world.entry(B)["state"], world.entry(B)["reason"]) == ("Rejected", "CandidateUnavailable")
    assert "keeps crashing" in world.entry(B)["message"]


def test_restarts_of_the_past_are_no_crash_loop_but_restarts_without_an_end_are() -> None:
    world = trying()
    world.restarts[B_NAME] = 9
    world.settle()
    assert world.entry(B)["state"] == "Candidate"
    world.broken.add(B_NAME)
    world.settle()
    assert (world.entry(B)["state"], world.entry(B)["reason"]) == ("Rejected", "CandidateUnavailable")


def test_a_pod_that_is_told_to_go_is_no_crash_loop_whatever_its_past() -> None:
    world = trying()
    world.restarts[B_NAME] = 9
    world.until("Progressing")
    world.leaving.add(B_NAME)
    world.run(2)
    assert (world.entry(B)["state"], world.config.canary) == ("Candidate", None)
    world.leaving.clear()
    world.until("Healthy")
    assert world.entry(B)["state"] == "Stable"


def test_a_rollback_does_not_wait_for_stable_to_be_healthy() -> None:
    world = trying()
    world.until("Progressing")
    world.broken.add(A_NAME)
    world.crashing.add(B_NAME)
    world.kubelet()
    world.step()
    assert world.config.canary is None
    assert world.condition("StableAvailable")["status"] == "False"


def test_abort_by_decision_and_rejection_until_cleared() -> None:
    world = trying()
    world.decide("Abort", B, by="grace")
    world.settle()
    assert world.status["phase"] == "RolledBack"
    assert world.entry(B)["message"] == "aborted by grace: looked at it"
    trial = world.status["trial"]
    world.run(30)
    assert world.status["trial"] == trial  # the digest stays refused
    world.now += timedelta(seconds=5)
    world.decide("ClearRejection", B)
    world.settle()
    assert (world.entry(B)["state"], world.status["trial"]) == ("Candidate", trial + 1)
    assert "ada (d1)" in next(e for e in world.status["revisions"] if e["digest"] == B)["clearedBy"]
    world.until("Healthy")  # the old abort is about the old trial
    assert world.entry(B)["state"] == "Stable"


def test_a_digest_that_failed_a_guardrail_is_refused_even_after_the_spec_moved_on() -> None:
    world = trying(stages=STAGES[1:])
    world.until("RolledBack", canary_bad=0.5)
    world.spec(policy=source(A))
    world.settle()
    assert world.status["phase"] == "Healthy"
    world.spec(policy=source(B))
    world.settle()
    assert (world.status["phase"], world.condition("Progressing")["reason"]) == ("RolledBack", "DigestRejected")
    assert B in world.condition("Progressing")["message"]
    assert "ClearRejection" in world.condition("Progressing")["message"]


def test_an_abort_is_forgotten_when_the_spec_moves_on() -> None:
    world = trying()
    world.decide("Abort", B)
    world.settle()
    world.spec(policy=source(A))
    world.settle()
    world.now += timedelta(seconds=2)
    world.spec(policy=source(B))
    world.settle()
    assert world.entry(B)["state"] == "Candidate"
