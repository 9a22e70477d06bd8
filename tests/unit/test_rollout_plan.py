"""The plan of a PolicyRollout, situation by situation, in a small cluster in memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from rlhf_operator.kinds.base import Key
from tests.unit.rollout_world import GUARDRAILS, STAGES, A, B, C, World, source

A_NAME, B_NAME, C_NAME = (f"desk-{letter * 10}" for letter in "abc")
SAFETY_ONLY = [{"metric": "safetyViolationRate", "margin": 0.05}]


def trying(digest: str = B, **spec: Any) -> World:
    """A world with A stable and another policy as the candidate in its first stage."""
    world = World(**spec).serving()
    world.spec(policy=source(digest))
    world.settle()
    return world


def names(world: World, kind: str) -> set[str]:
    return {name for found, name in world.children if found == kind}


# The way up


def test_the_first_policy_goes_straight_to_stable() -> None:
    world = World().serving()
    assert world.entry(A)["state"] == "Stable"
    assert world.config.stable is not None
    assert (world.config.stable.revision, world.config.canary) == (A_NAME, None)
    assert world.condition("Ready")["status"] == "True"
    assert world.condition("Progressing")["reason"] == "FirstRevision"


def reserved(world: World, deployment: str) -> dict[str, Any]:
    (container,) = world.children["Deployment", deployment]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container["resources"]
    return found


def test_gateways_and_policy_servers_reserve_cpu_for_users_wait_for_them() -> None:
    """BestEffort pods stand still for seconds beside training pods on a busy node."""
    world = World().serving()
    assert reserved(world, "desk-gateway") == {"requests": {"cpu": "200m", "memory": "128Mi"}}
    assert reserved(world, A_NAME) == {"requests": {"cpu": "200m"}}


@pytest.mark.parametrize(
    ("asked", "gateway", "server"),
    [
        (
            {"requests": {"cpu": 2}},
            {"requests": {"cpu": 2, "memory": "128Mi"}},
            {"requests": {"cpu": 2}},
        ),
        (  # a default request above a limit would be refused: a limit is its own request
            {"limits": {"cpu": "100m"}},
            {"limits": {"cpu": "100m"}, "requests": {"memory": "128Mi"}},
            {"limits": {"cpu": "100m"}},
        ),
        (
            {"limits": {"nvidia.com/gpu": 1}, "requests": {"memory": "1Gi"}},
            {"limits": {"nvidia.com/gpu": 1}, "requests": {"cpu": "200m", "memory": "1Gi"}},
            {"limits": {"nvidia.com/gpu": 1}, "requests": {"cpu": "200m", "memory": "1Gi"}},
        ),
    ],
)
def test_what_is_asked_for_replaces_what_is_reserved_resource_by_resource(
    asked: dict[str, Any], gateway: dict[str, Any], server: dict[str, Any]
) -> None:
    world = World(routing={"resources": asked}, serving={"resources": asked}).serving()
    assert reserved(world, "desk-gateway") == gateway
    assert reserved(world, A_NAME) == server


def test_a_first_policy_that_never_served_is_replaced_without_a_trial() -> None:
    world = World()
    world.broken.add(A_NAME)
    world.settle()
    assert world.status["phase"] == "Pending"
    world.spec(policy=source(B))
    world.settle()
    assert (world.status["phase"], world.entry(B)["state"], world.entry(A)["state"]) == (
        "Healthy",
        "Stable",
        "Superseded",
    )
    assert names(world, "Deployment") == {"desk-gateway", B_NAME}


def test_a_first_policy_that_cannot_start_is_failed() -> None:
    world = World()
    world.crashing.add(A_NAME)
    world.settle()
    assert world.status["phase"] == "Failed"
    assert "CrashLoop" not in world.condition("Degraded")["message"]
    assert "keeps crashing" in world.condition("Degraded")["message"]


def test_a_good_candidate_is_shadowed_ramped_and_promoted_by_moving_the_pointer() -> None:
    world = trying()
    assert world.status["phase"] == "Shadowing"
    deployment = world.children["Deployment", B_NAME]["spec"]["template"]
    world.until("Healthy")
    assert world.entry(B)["state"] == "Stable"
    assert world.entry(B)["stageReached"] == 2
    assert {verdict["state"] for verdict in world.entry(B)["verdicts"]} == {"Pass"}
    assert world.config.stable is not None
    assert (world.config.stable.revision, world.config.canary_weight_percent) == (B_NAME, 0.0)
    assert world.children["Deployment", B_NAME]["spec"]["template"] == deployment  # no model is loaded again
    seen = list(dict.fromkeys(world.weights_seen))
    assert seen == [0.0, 10.0, 50.0]


def test_a_candidate_is_scaled_up_before_it_takes_all_traffic() -> None:
    world = trying(serving={"replicas": 3, "canaryReplicas": 1}, stages=STAGES[1:], guardrails=SAFETY_ONLY)
    replicas = []
    for _ in range(400):
        world.run(1)
        stable = world.config.stable
        assert stable is not None
        replicas.append((stable.revision, world.children["Deployment", B_NAME]["spec"]["replicas"]))
        if stable.revision == B_NAME:
            break
    assert (A_NAME, 1) in replicas
    assert all(count == 3 for revision, count in replicas if revision == B_NAME)
    assert replicas[-1] == (B_NAME, 3)


def test_a_former_stable_stays_loaded_for_its_time_and_then_goes() -> None:
    world = trying(rollback={"retainStable": "10m"})
    world.until("Healthy")
    assert world.entry(A)["state"] == "Retained"
    assert A_NAME in names(world, "Deployment")
    world.now += timedelta(minutes=10, seconds=1)
    world.settle()
    assert world.entry(A)["state"] == "Retired"
    assert A_NAME not in names(world, "Deployment") | names(world, "Service")


def test_samples_decide_and_not_time_alone() -> None:
    world = trying()
    world.run(1, per_second=30)
    assert world.status["stage"] == 0
    world.now += timedelta(days=1)
    world.run(3, per_second=0)
    assert (world.status["stage"], world.status["phase"]) == (0, "Shadowing")
    message = world.condition("Progressing")["message"]
    assert "30 of 50 candidate conversations" in message
    assert "20 more needed" in message


def test_no_user_is_sent_to_a_candidate_that_looks_worse_in_the_shadow() -> None:
    """120 conversations neither pass nor fail a candidate that leaks somewhat more: it waits until they decide."""
    world = trying(seed=3, guardrails=[{**GUARDRAILS[0], "margin": 0.1}])
    world.run(6, canary_bad=0.12, stable_bad=0.05)
    assert world.status["verdicts"][0]["state"] == "NeedMoreData"
    assert world.status["verdicts"][0]["estimate"] > 0.05
    assert (world.status["stage"], world.condition("Progressing")["reason"]) == (0, "NeedMoreSamples")
    assert "looks worse in its shadow stage" in world.condition("Progressing")["message"]
    world.until("RolledBack", canary_bad=0.5, stable_bad=0.05)
    assert set(world.weights_seen) == {0.0}


def test_one_that_looked_worse_by_chance_goes_on_when_it_no_longer_does() -> None:
    world = trying(seed=3, guardrails=[{**GUARDRAILS[0], "margin": 0.1}])
    world.run(6, canary_bad=0.12, stable_bad=0.05)
    assert world.status["stage"] == 0
    world.until("Healthy")


def test_slow_copies_do_not_hold_the_shadow() -> None:
    """Nobody waits for a mirrored answer: latency is judged under real traffic."""
    world = trying(guardrails=GUARDRAILS[2:])
    world.run(3, canary_slow=0.12)
    assert world.status["stage"] == 1


def test_minimum_duration_holds_a_stage_that_has_its_samples() -> None:
    world = trying(stages=[{"weightPercent": 50, "minSamples": 10, "minDuration": "5m"}, STAGES[2]])
    world.run(5)
    world.now += timedelta(minutes=4)
    world.settle()
    assert (world.status["stage"], world.condition("Progressing")["reason"]) == (0, "StageRunning")
    world.now += timedelta(minutes=1)
    world.settle()
    assert world.status["stage"] == 1


def test_a_sub_percent_weight_reaches_the_gateway_as_it_is() -> None:
    world = trying(stages=[{"weightPercent": 0.25, "minSamples": 10}, STAGES[2]])
    assert world.config.canary_weight_percent == 0.25


def test_a_promotion_needs_every_guardrail_to_pass_and_says_what_is_missing() -> None:
    tight = [{"metric": "safetyViolationRate", "margin": 0.001}]
    world = trying(stages=STAGES[2:], guardrails=tight)
    world.run(60)
    assert world.status["stageSamples"] >= 200
    assert (world.status["phase"], world.condition("Progressing")["reason"]) == ("Progressing", "NeedMoreSamples")
    (verdict,) = world.status["verdicts"]
    assert verdict["state"] == "NeedMoreData"
    assert verdict["needed"] > 1000
    assert verdict["etaSeconds"] == pytest.approx(verdict["needed"] / 10.0, rel=0.3)


# No evidence


def test_without_traffic_nothing_is_promoted_or_rolled_back_and_nothing_is_written() -> None:
    world = trying()
    writes = len(world.writes)
    for _ in range(48):
        world.now += timedelta(minutes=30)
        world.pull()
        world.step()
        world.kubelet()
    assert len(world.writes) == writes
    assert (world.status["phase"], world.status["stage"]) == ("Shadowing", 0)
    assert world.condition("Progressing")["reason"] == "NeedMoreSamples"
    assert "0 of 50 candidate conversations in stage 0: 50 more needed" in world.condition("Progressing")["message"]
    assert {verdict["state"] for verdict in world.status["verdicts"]} == {"NeedMoreData"}


def test_without_a_judging_filter_safety_is_unknown_and_blocks_the_promotion() -> None:
    world = trying()
    for gateway in world.gateways.values():
        gateway.count = _unjudged(gateway.count)  # type: ignore[method-assign]  # a filter that is not loaded
    world.run(60)
    safety = next(v for v in world.status["verdicts"] if v["metric"] == "safetyViolationRate")
    assert (safety["state"], world.entry(B)["state"]) == ("Unknown", "Candidate")
    assert world.condition("SafetyOK")["status"] == "Unknown"
    assert "no answer was judged" in world.condition("Progressing")["message"]


def _unjudged(count):  # type: ignore[no-untyped-def]
    return lambda *args, **kwargs: count(*args, **{**kwargs, "judged": False})


def test_blind_gateways_hold_the_ramp_and_sight_lets_it_go_on() -> None:
    world = trying()
    world.until("Progressing")
    for gateway in world.gateways.values():
        gateway.reachable = False
    world.run(120)
    assert world.condition("MetricsAvailable")["status"] == "False"
    assert world.condition("Progressing")["reason"] == "MetricsBlind"
    assert "no route to host" in world.condition("Progressing")["message"]
    assert world.config.canary_weight_percent == 10.0
    for gateway in world.gateways.values():
        gateway.reachable = True
    world.until("Healthy")


def test_blind_for_too_long_rolls_back_where_that_is_asked_for() -> None:
    world = trying(onBlind={"maxDuration": "1m", "action": "Rollback"})
    world.until("Progressing")
    for gateway in world.gateways.values():
        gateway.reachable = False
    world.run(45)
    assert world.entry(B)["state"] == "Candidate"
    world.run(60)
    assert (world.entry(B)["state"], world.entry(B)["reason"]) == ("Rejected", "MetricsBlind")
    assert world.config.canary is None


# The way down


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


# Candidates that come and go


def test_a_newer_candidate_replaces_the_one_under_test_with_fresh_evidence() -> None:
    world = trying()
    world.run(2)
    assert world.status["stageSamples"] > 0
    world.spec(policy=source(C))
    world.settle()
    assert (world.entry(B)["state"], world.entry(C)["state"]) == ("Superseded", "Candidate")
    assert (world.status["stage"], world.status["stageSamples"], world.status["trial"]) == (0, 0, 2)
    assert B_NAME not in names(world, "Deployment")
    world.until("Healthy")
    assert world.entry(C)["state"] == "Stable"


def test_a_spec_that_is_reverted_in_mid_ramp_takes_the_candidate_out() -> None:
    world = trying()
    world.until("Progressing")
    world.spec(policy=source(A))
    world.settle()
    assert (world.status["phase"], world.config.canary) == ("Healthy", None)
    assert world.entry(B)["state"] == "Superseded"


def test_an_old_trial_of_the_same_digest_lends_no_evidence() -> None:
    world = trying()
    world.run(2)
    world.spec(policy=source(A))
    world.settle()
    world.now += timedelta(seconds=2)
    world.spec(policy=source(B))
    world.settle()
    assert (world.status["stageSamples"], world.status["trial"]) == (0, 2)


def test_changed_stages_or_guardrails_start_the_trial_again() -> None:
    world = trying()
    world.run(2)
    world.spec(guardrails=SAFETY_ONLY)
    world.settle()
    assert (world.status["trial"], world.status["stageSamples"]) == (2, 0)
    assert world.entry(B)["state"] == "Candidate"


def test_an_upstream_job_hands_its_policy_over_when_it_is_complete() -> None:
    world = World(policy={"jobRef": {"name": "tuned"}})
    world.settle()
    assert (world.status["phase"], world.condition("Progressing")["reason"]) == ("Pending", "WaitingForUpstream")
    assert "does not exist" in world.condition("Progressing")["message"]
    job = {"metadata": {"name": "tuned"}, "status": {"phase": "Running", "artifact": source(B)}}
    key = Key("PolicyOptimizationJob", "team", "tuned")
    world.related[key] = job
    world.settle()
    assert "it is Running" in world.condition("Progressing")["message"]
    job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
    world.settle()
    assert (world.status["phase"], world.entry(B)["state"]) == ("Healthy", "Stable")


# People


def approval_world() -> World:
    stages = [{"weightPercent": 50, "minSamples": 50, "approval": "Required"}, STAGES[2]]
    world = trying(stages=stages, guardrails=SAFETY_ONLY)
    world.until("AwaitingApproval")
    return world


def test_a_stage_waits_for_its_approval_and_the_ledger_names_who_gave_it() -> None:
    world = approval_world()
    assert world.condition("Approved")["status"] == "False"
    assert B in world.condition("Progressing")["message"]
    world.run(60)
    assert world.status["stage"] == 0
    world.decide("Approve", B, stage=0, by="grace")
    world.settle()
    assert world.status["stage"] == 1
    assert world.entry(B)["approvals"] == ["stage 0: grace (d0): looked at it"]


@pytest.mark.parametrize(
    ("digest", "stage", "more"),
    [(C, 0, {}), (B, 1, {}), (B, 0, {"expiresAt": "2026-11-23T12:00:01Z"})],
    ids=["another digest", "another stage", "expired"],
)
def test_an_approval_of_something_else_does_not_count(digest: str, stage: int, more: dict[str, str]) -> None:
    world = approval_world()
    world.decide("Approve", digest, stage=stage, **more)
    world.settle()
    assert world.status["phase"] == "AwaitingApproval"


def test_an_approval_is_not_reused_for_a_later_trial() -> None:
    world = approval_world()
    world.decide("Approve", B, stage=0)
    world.settle()
    world.now += timedelta(seconds=2)
    world.decide("Abort", B)
    world.settle()
    world.now += timedelta(seconds=2)
    world.decide("ClearRejection", B)
    world.settle()
    world.until("AwaitingApproval")
    world.run(5)
    assert world.status["phase"] == "AwaitingApproval"


def test_decisions_that_are_not_honoured_do_nothing_and_the_message_says_so() -> None:
    world = approval_world()
    world.honoured = False
    world.decide("Approve", B, stage=0)
    world.settle()
    assert world.status["phase"] == "AwaitingApproval"
    assert "not honoured" in world.condition("Progressing")["message"]


def test_paused_holds_the_weight_and_still_rolls_back() -> None:
    world = trying(stages=STAGES[1:])
    world.run(1)
    world.spec(paused=True)
    world.run(60)
    assert (world.status["phase"], world.status["stage"], world.config.canary_weight_percent) == ("Paused", 0, 10.0)
    world.run(20, canary_bad=0.5)
    assert world.entry(B)["state"] == "Rejected"


def test_resumed_goes_on_where_it_was() -> None:
    world = trying(stages=STAGES[1:])
    world.spec(paused=True)
    world.run(60)
    world.spec(paused=False)
    world.settle()
    assert world.status["stage"] == 1
    world.until("Healthy")


# The split


def test_a_wrong_split_stops_the_ramp() -> None:
    world = trying(stages=STAGES[1:])
    for gateway in world.gateways.values():
        wrong = gateway.config.model_copy(update={"canary_weight_percent": 40.0}) if gateway.config else None
        gateway.config = wrong
    world.follow = False
    world.run(120)
    assert world.condition("SplitVerified")["status"] == "False"
    assert world.condition("Progressing")["reason"] == "SplitMismatch"
    assert "10 % are configured" in world.condition("Progressing")["message"]
    assert world.status["stage"] == 0


def test_the_observed_weight_is_reported() -> None:
    world = trying(stages=STAGES[1:], guardrails=GUARDRAILS)
    world.run(29, per_second=100)
    assert world.status["weights"]["desired"] == world.status["weights"]["written"] == 10.0
    assert world.status["weights"]["observed"] == pytest.approx(10.0, abs=2.0)
    assert world.condition("SplitVerified")["status"] == "True"


def test_a_configuration_that_somebody_deleted_comes_back_under_a_generation_never_used() -> None:
    """Else a gateway that still acts on the old one would be taken for one that acts on the new one."""
    world = trying()
    before = world.config
    del world.children["ConfigMap", "desk-gateway"]
    world.gateways.clear()
    for key in [key for key in world.children if key[0] == "Pod"]:
        del world.children[key]
    world.step()
    assert world.config.generation == before.generation + 1
