"""A rollout under everything that can happen to it: random histories, killed passes, damaged objects."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_operator.kinds.policy_rollout import SPEC
from tests.unit.rollout_world import STAGES, A, B, C, Gateway, World, source

SHORT = [{"weightPercent": 10, "minSamples": 20}, {"weightPercent": 50, "minSamples": 40}]
WIDE = [
    {"metric": "safetyViolationRate", "margin": 0.1},
    {"metric": "availability", "margin": 0.1},
    {"metric": "latencyP95", "margin": 0.1},
]


def candidate_samples(world: World) -> int:
    """What the gateways' counters of the present stage add up to."""
    stage = world.config.stage
    return sum(
        row["n"]
        for gateway in world.gateways.values()
        for (number, arm, _, _), row in gateway.rows.items()
        if (number, arm) == (stage, "canary")
    )


# Killed between any two writes


@pytest.mark.parametrize("harm", [0.0, 0.6], ids=["good candidate", "leaking candidate"])
@pytest.mark.parametrize("survives", [0, 1, 2])
def test_an_operator_killed_in_every_pass_ends_where_an_undisturbed_one_does(harm: float, survives: int) -> None:
    """Every pass that would write dies after `survives` writes; the next process starts from what is there."""
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    for _ in range(200):
        world.now += timedelta(seconds=1)
        world.traffic(20, canary_bad=harm)
        world.pull()
        world.step(stop_after=survives)
        world.kubelet()
        world.pull()
        world.step()  # the next process
        world.kubelet()
        if world.status["phase"] in ("Healthy", "RolledBack") and world.entry(B)["state"] != "Candidate":
            break
    world.settle()
    expected = ("RolledBack", "Rejected", "Stable") if harm else ("Healthy", "Stable", "Retained")
    assert (world.status["phase"], world.entry(B)["state"], world.entry(A)["state"]) == expected
    assert world.config.canary is None


def test_a_rollback_survives_a_kill_between_record_and_route_even_if_the_evidence_is_gone() -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.now += timedelta(seconds=1)
    world.traffic(400, canary_bad=0.9)
    world.pull()
    assert world.step(stop_after=1) == 1
    assert world.writes[-1] == "status"
    assert world.entry(B)["state"] == "Rejected"  # the record is there,
    assert world.config.canary_weight_percent == 10.0  # the route is not yet
    for gateway in world.gateways.values():
        gateway.restart()  # and nobody could count it again
    world.pull()
    world.step()
    assert world.config.canary is None
    world.settle()
    assert world.status["phase"] == "RolledBack"


def test_a_kill_between_route_and_status_after_an_endpoint_loss_is_made_good() -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.broken.add("desk-bbbbbbbbbb")
    world.kubelet()
    world.step(stop_after=1)
    assert world.writes[-1] == "apply ConfigMap desk-gateway"  # the route first: the loss will be seen again
    assert world.config.canary is None
    world.settle()
    assert world.condition("Progressing")["reason"] == "CandidateUnavailable"


# Evidence


def test_a_gateway_restarted_in_mid_stage_loses_nothing_that_was_folded() -> None:
    world = World(
        stages=[{"weightPercent": 50, "minSamples": 5000}], guardrails=WIDE, routing={"replicas": 2}
    ).serving()
    world.spec(policy=source(B))
    world.settle()
    world.run(6)
    world.now += timedelta(seconds=6)
    world.settle()
    folded = candidate_samples(world)
    assert world.status["stageSamples"] == folded > 0
    victim = next(iter(world.gateways.values()))
    first_life = folded - candidate_samples_without(world, victim)
    victim.restart()
    world.run(6)
    world.now += timedelta(seconds=6)
    world.settle()
    assert world.status["stageSamples"] == first_life + candidate_samples(world)  # its second life counts from 0
    unreported = candidate_samples(world)
    world.traffic(20)
    victim.restart()  # what it counted since the last pull is lost, and nothing takes its place
    world.now += timedelta(seconds=6)
    world.settle()
    assert world.status["stageSamples"] < first_life + unreported + 20


def candidate_samples_without(world: World, gateway: Gateway) -> int:
    others = {uid: other for uid, other in world.gateways.items() if other is not gateway}
    everyone, world.gateways = world.gateways, others
    try:
        return candidate_samples(world)
    finally:
        world.gateways = everyone


def test_pulling_again_without_new_counts_writes_nothing() -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.run(1)
    world.now += timedelta(seconds=10)
    world.settle()
    writes = len(world.writes)
    for _ in range(20):
        world.now += timedelta(seconds=1)
        world.pull()
        world.step()
    assert len(world.writes) == writes


def test_under_traffic_the_status_is_written_every_few_seconds_and_not_at_every_pull() -> None:
    world = World(stages=[{"weightPercent": 50, "minSamples": 100_000}], guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.run(30)
    writes = len(world.writes)
    world.run(60)
    assert 10 <= len(world.writes) - writes <= 14


# Random histories

_CLUSTER = ["wait", "pass", "kill", "break", "crash", "heal", "restart", "blind", "see", "lag", "follow"]
_PEOPLE = ["try B", "try C", "back to A", "pause", "resume", "abort", "clear", "approve", "skip", "replan"]
ACTIONS = ["traffic", "leak", "fail", "slow", *_CLUSTER, *_PEOPLE]


def act(world: World, action: str, number: int) -> None:
    candidate = next((e for e in world.status.get("revisions", []) if e["state"] == "Candidate"), None)
    digest = candidate["digest"] if candidate else B
    running = any(g.config is not None and g.config.stable is not None for g in world.gateways.values())
    match action:
        case "traffic" | "leak" | "fail" | "slow" if running:
            kind = {"leak": "canary_bad", "fail": "canary_failed", "slow": "canary_slow"}.get(action)
            world.traffic(30 * number, **({kind: 0.5} if kind else {}))  # type: ignore[arg-type]
        case "wait":
            world.now += timedelta(seconds=20 * number)
        case "kill":
            world.pull()
            world.step(stop_after=number)
        case "break" | "crash" if candidate:
            (world.broken if action == "break" else world.crashing).add(candidate["revision"])
        case "heal":
            world.broken.clear()
            world.crashing.clear()
        case "restart":
            for gateway in world.gateways.values():
                gateway.restart()
        case "blind" | "see":
            for gateway in world.gateways.values():
                gateway.reachable = action == "see"
        case "lag" | "follow":
            world.follow = action == "follow"
        case "try B" | "try C" | "back to A":
            world.spec(policy=source({"B": B, "C": C, "A": A}[action[-1]]))
        case "pause" | "resume":
            world.spec(paused=action == "pause")
        case "abort":
            world.decide("Abort", digest)
        case "clear":
            world.decide("ClearRejection", digest)
        case "approve":
            world.decide("Approve", digest, stage=number % 2)
        case "skip":
            world.decide("SkipStage", digest, stage=number % 3)
        case "replan":
            world.spec(stages=STAGES[1:] if number % 2 else SHORT)


def check(world: World, generation: dict[int, str]) -> None:
    """What holds at any moment, whatever happened."""
    if ("ConfigMap", "desk-gateway") not in world.children:
        return
    config = world.config
    text = config.model_copy(update={"generation": 0}).to_json()
    assert generation.setdefault(config.generation, text) == text, "one generation, two configurations"
    states = {e["revision"]: e["state"] for e in world.status.get("revisions", [])}
    if config.canary is not None:
        assert config.stable is not None
        assert config.stable.revision != config.canary.revision
    for entry in world.status.get("revisions", []):
        if entry["state"] == "Stable" and entry.get("reason") == "Promoted":
            assert {v["state"] for v in entry["verdicts"]} == {"Pass"}, "promoted without passing"
    assert sum(state == "Stable" for state in states.values()) <= 1
    for gateway in world.gateways.values():
        for backend in (gateway.config.stable, gateway.config.canary) if gateway.config else ():
            if backend is not None:
                assert ("Deployment", backend.revision) in world.children, "a gateway routes to what was deleted"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 4)), min_size=3, max_size=25))
def test_any_history_keeps_the_invariants_and_comes_to_rest(script: list[tuple[str, int]]) -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    generation: dict[int, str] = {}
    for action, number in script:
        act(world, action, number)
        world.now += timedelta(seconds=1)
        world.pull()
        before = copy.deepcopy(world.primary.get("status", {}))
        world.step()
        if action != "kill":
            gone = ("Rejected", "Superseded")  # a policy that is tried again has such an entry besides
            loaded = {e["revision"] for e in world.status["revisions"] if e["state"] not in gone}
            assert world.config.canary is None or world.config.canary.revision in loaded
        check(world, generation)
        world.kubelet()
        check(world, generation)
        assert world.status["trial"] >= before.get("trial", 0)
    world.follow = True
    world.broken.clear()
    world.crashing.clear()
    world.settle(60)


# Anything may be in the store

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_plan_is_total_on_damaged_objects(data: st.DataObject) -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.run(2)
    for _ in range(data.draw(st.integers(1, 4))):
        _damage(data, data.draw(st.sampled_from([world.primary, *world.children.values()])))
    for plan in (SPEC.plan(world.observed()), SPEC.plan(world.observed())):
        assert set(plan.status) >= {"phase"}


@pytest.mark.parametrize("phase", ["Healthy", "RolledBack"])
def test_a_reason_that_a_newer_operator_wrote_stops_nothing(phase: str) -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    if phase == "RolledBack":
        world.spec(policy=source(B))
        world.settle()
        world.decide("Abort", B)
        world.step()  # the record; the candidate's pods are still there
    world.primary["status"]["revisions"][-1]["reason"] = "OfAnotherVersion"
    world.settle()
    assert world.status["phase"] == phase


def test_a_stage_that_there_is_not_is_the_first_one() -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    world.primary["status"]["stage"] = -1
    world.settle()
    assert world.status["stage"] == 0


@pytest.mark.parametrize("addresses", [True, 7, "10.0.0.1", None, {}])
def test_addresses_that_are_no_list_stop_nothing(addresses: Any) -> None:
    """Found by the test above, once in many runs."""
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    for child in world.children.values():
        for endpoint in child.get("endpoints", ()):
            endpoint["addresses"] = addresses
    assert set(SPEC.plan(world.observed()).status) >= {"phase"}


def _damage(data: st.DataObject, target: Any) -> None:
    """Replaces one value somewhere below metadata, spec, data or status."""
    for _ in range(6):
        keys = [key for key in target if not (key in ("kind", "uid", "name") and isinstance(target, dict))]
        keys = keys if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(target[key], dict | list) and target[key] and data.draw(st.booleans()):
            target = target[key]
            continue
        if key not in ("metadata", "labels"):
            target[key] = data.draw(json_values)
        return


@pytest.mark.parametrize("body", [None, [], 3, "x", {}, {"podUid": "other", "epoch": "e"}, {"podUid": 4}])
def test_answers_that_are_no_evidence_hold_the_ramp_and_break_nothing(body: Any) -> None:
    world = World(stages=SHORT, guardrails=WIDE).serving()
    world.spec(policy=source(B))
    world.settle()
    for gateway in world.gateways.values():
        gateway.evidence = lambda: body  # type: ignore[method-assign]
    world.run(5)
    assert world.condition("Progressing")["reason"] in ("MetricsBlind", "NeedMoreSamples")
    assert world.status["stage"] == 0
