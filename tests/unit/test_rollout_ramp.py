"""The plan of a PolicyRollout on the way up: stages, evidence and what holds them, the split."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.unit.rollout_world import (
    A_NAME,
    B_NAME,
    GUARDRAILS,
    SAFETY_ONLY,
    STAGES,
    A,
    B,
    World,
    names,
    source,
    trying,
)


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


def test_time_without_a_pod_is_no_time_at_the_weight_of_a_stage() -> None:
    world = trying(stages=[{"weightPercent": 50, "minSamples": 10, "minDuration": "5m"}, STAGES[2]])
    world.run(5)
    world.broken.add(B_NAME)
    world.kubelet()
    world.settle()
    world.now += timedelta(minutes=10)
    world.broken.clear()
    world.kubelet()
    world.settle()
    assert (world.status["stage"], world.condition("Progressing")["reason"]) == (0, "StageRunning")
    assert world.config.canary_weight_percent == 50.0
    world.now += timedelta(minutes=5)
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


def test_no_user_is_sent_to_a_candidate_whose_safety_is_not_judged_and_it_says_why() -> None:
    world = trying()
    for gateway in world.gateways.values():
        gateway.errors = ("safety filter /in/feedback/filter.json cannot be read: is its claim mounted?",)
    world.run(60)
    assert (world.status["stage"], max(world.weights_seen)) == (0, 0.0)
    progressing, degraded = world.condition("Progressing"), world.condition("Degraded")
    assert (progressing["reason"], degraded["status"]) == ("MetricsBlind", "True")
    assert "is its claim mounted?" in progressing["message"]
    for gateway in world.gateways.values():
        gateway.errors = ()
    world.until("Healthy")
    assert world.entry(B)["state"] == "Stable"


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
