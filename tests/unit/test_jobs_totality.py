"""plan() never raises and comes to rest, whatever the status, the children and the clock look like."""

from __future__ import annotations

import copy
import json
from datetime import UTC
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_operator.api.labels import ATTEMPT
from rlhf_operator.kinds.base import Pulled
from rlhf_operator.kinds.training.pods import parse_result
from tests.unit.jobs_world import ALGORITHMS, START, UID, World, algorithm_spec, result, reward_spec, success

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
TIMES = st.sampled_from(
    ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59+00:00",
     "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "yesterday", ""]
)  # fmt: skip
GARBAGE = st.recursive(
    SCALARS | TIMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, inner in items for p in _paths(inner, (*path, key)))]


def _put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree[path[0]] = _put(tree[path[0]], path[1:], value)
    return tree


def _mutate(data: st.DataObject, tree: Any, times: int) -> Any:
    for _ in range(times):
        path = data.draw(st.sampled_from(_paths(tree)))
        tree = _put(tree, path, data.draw(GARBAGE))
    return tree


def _mutated_list(data: st.DataObject, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    """As many objects, some of them garbage inside; what is no object at all the store would not hold."""
    return tuple(
        mutated
        if isinstance(mutated := _mutate(data, json.loads(json.dumps(o)), data.draw(st.integers(0, 2))), dict)
        else o
        for o in objects
    )


def _world(data: st.DataObject) -> World:
    """A job somewhere in its life."""
    kind = data.draw(st.sampled_from(["RewardModelJob", "PolicyOptimizationJob"]))
    more = {"ttlSecondsAfterFinished": 60, "preRunningDeadlineSeconds": 30, "activeDeadlineSeconds": 90,
            "budget": {"gpuHours": 0.1}}  # fmt: skip
    algorithm = data.draw(st.sampled_from([*ALGORITHMS]))
    world = World(reward_spec(**more) if kind == "RewardModelJob" else algorithm_spec(algorithm, **more), kind=kind)
    world.upstream()
    world.upstream("teacher", kind="PolicyOptimizationJob")
    world.tick()
    stage = data.draw(st.integers(0, 6))
    if stage >= 1:
        world.run_pods()
    if stage >= 2:
        world.report(step=2)
    if stage == 3:
        world.fail(1, result("NoProgress", 22))
    if stage == 4:
        world.complete(success())
    if stage == 5:
        world.edit(suspend=True)
    if stage == 6:
        world.children["Pod"].clear()
        world.finish_job("Complete")
        world.tick()
    return world


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_plan_is_total(data: st.DataObject) -> None:
    world = _world(data)
    plan = world.tick()
    observed = world.observed(plan)
    children = {name: _mutated_list(data, objects) for name, objects in observed.children.items()}
    primary = json.loads(json.dumps(observed.primary))
    primary["status"] = _mutate(data, primary.get("status", {}), data.draw(st.integers(0, 3)))
    now = data.draw(st.datetimes(timezones=st.just(UTC)))
    pulled = {key: Pulled(data.draw(GARBAGE), now, None, now) for key in observed.pulled}
    mutated = type(observed)(
        primary, children, observed.related, (data.draw(GARBAGE),), True, pulled, now, observed.settings
    )
    first = world.plan(mutated)
    assert json.loads(json.dumps(first.status)) == first.status
    assert world.plan(mutated) == first, "the same observation must lead to the same plan"
    for condition in first.status["conditions"]:
        assert condition["status"] in ("True", "False", "Unknown")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_spec_of_garbage_is_refused_and_never_raises(data: st.DataObject) -> None:
    algorithm = data.draw(st.none() | st.sampled_from([*ALGORITHMS]))
    world = World() if algorithm is None else World(algorithm_spec(algorithm), kind="PolicyOptimizationJob")
    world.upstream()
    world.upstream("teacher", kind="PolicyOptimizationJob")
    world.primary["spec"] = _mutate(data, copy.deepcopy(world.primary["spec"]), data.draw(st.integers(1, 3)))
    plan = world.once()
    accepted = next(c for c in plan.status["conditions"] if c["type"] == "Accepted")
    assert accepted["status"] in ("True", "False")


STEPS = st.sampled_from(
    ["run", "report", "fail", "preempt", "oom", "complete", "suspend", "resume", "time", "lose status", "lose job",
     "lose pods", "queue", "kubelet lost"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=14))
def test_any_history_comes_to_rest_with_at_most_one_attempt_running(steps: list[str]) -> None:
    world = World(reward_spec(failurePolicy={"maxRestarts": 3}, ttlSecondsAfterFinished=5000))
    world.tick()
    highest = 0
    for step in steps:
        _act(world, step)
        if step == "lose status":
            highest = _shown(world)
        plan = world.tick()  # fails unless the plan comes to rest
        trainers = [j for j in world.children["Job"].values() if not j["metadata"]["name"].endswith("-report")]
        assert len(trainers) <= 1
        assert world.status["attempt"] >= highest, "an attempt number is never used again"
        highest = world.status["attempt"]
        numbers = [attempt["number"] for attempt in world.attempts]
        assert numbers == sorted(set(numbers))
        assert all("endedAt" in attempt for attempt in world.attempts[:-1])
        assert plan.status == world.status


def _shown(world: World) -> int:
    """The highest attempt that children tell of."""
    objects = (child for kind in world.children.values() for child in kind.values())
    return max((int(child["metadata"]["labels"][ATTEMPT]) for child in objects), default=0)


def _act(world: World, step: str) -> None:
    running = [pod for pod in world.pods() if pod["status"]["phase"] in ("Pending", "Running")]
    jobs = [j for j in world.children["Job"].values() if not j["metadata"]["name"].endswith("-report")]
    ready = len(running) == 2 and jobs and "status" not in jobs[0]
    if step == "run" and ready:
        world.run_pods()
    elif step == "report" and ready:
        world.report(step=len(world.log))
    elif step == "fail" and ready:
        world.fail(1)
    elif step == "oom" and ready:
        world.fail(137, "", "OOMKilled")
    elif step == "preempt" and ready:
        world.mark(world.pods()[1], "DisruptionTarget", reason="PreemptionByScheduler")
        world.fail(20, result("Preempted", 20))
    elif step == "complete" and ready:
        world.complete()
    elif step in ("suspend", "resume"):
        world.edit(suspend=step == "suspend")
    elif step == "time":
        world.tick(400)
    elif step == "lose status":
        world.primary["status"] = {}
    elif step == "lose job" and jobs:
        world._delete("Job", jobs[0]["metadata"]["name"])
    elif step == "lose pods":
        world.children["Pod"].clear()
    elif step == "queue" and jobs:
        jobs[0]["spec"]["suspend"] = not jobs[0]["spec"].get("suspend", False)
    elif step == "kubelet lost" and running:
        world.request_deletion(running[0], 0)


def test_results_of_any_age_can_be_compared() -> None:
    found = parse_result(json.dumps({
        "failureClass": "Unknown", "reason": "x", "message": "y", "exitCode": 1, "attempt": 1, "uid": UID,
        "finishedAt": "2026-01-01T00:00:00",
    }))  # fmt: skip
    assert found is not None
    assert found.finished_at == START
