"""Two replicas on a real API server: one works, the other takes over; and what the probes say."""

from __future__ import annotations

import time

from tests.cluster.test_operator.world import Cluster, Operators, Replica, until


async def test_a_killed_leader_is_replaced_within_20_seconds(world: Cluster, operators: Operators) -> None:
    leader, follower = await _two(world, operators)
    leader.kill()
    killed = time.monotonic()
    await world.create(["after"])

    await until(lambda: _running(world, "after"), "the other replica works", seconds=40, log=follower.log)

    assert time.monotonic() - killed < 20
    assert await follower.is_leader()


async def test_a_graceful_stop_hands_over_within_3_seconds(world: Cluster, operators: Operators) -> None:
    leader, follower = await _two(world, operators)
    leader.stop()
    stopped = time.monotonic()
    await world.create(["after"])

    await until(lambda: _running(world, "after"), "the other replica works", seconds=40, log=follower.log)
    took = time.monotonic() - stopped
    await until(lambda: _ended(leader), "the first has ended", log=leader.log)

    assert took < 3
    assert leader.process.returncode == 0


async def test_only_the_leader_works_and_both_are_alive_and_ready(world: Cluster, operators: Operators) -> None:
    leader, follower = await _two(world, operators)
    await world.create(["one"])
    await until(lambda: _running(world, "one"), "it runs", log=leader.log)

    async def knows() -> bool:
        return await follower.metric("rlhf_operator_store_objects", kind="Widget") == 1

    await until(knows, "the follower's store is warm", log=follower.log)

    async def counted() -> bool:  # when its pass has ended
        return await leader.metric("rlhf_operator_reconcile_total", kind="Widget", result="wrote") >= 1

    await until(counted, "the leader's pass is counted", log=leader.log)
    assert await follower.metric("rlhf_operator_reconcile_total") == 0
    for replica in (leader, follower):
        assert await replica.status("/livez") == 200
        assert await replica.status("/readyz") == 200
        assert await replica.metric("rlhf_operator_watch_age_seconds") < 240 * 6


async def test_it_waits_for_its_crds_and_says_so(operators: Operators, kubectl) -> None:
    kubectl("delete", "crd", "decisions.rlhf.dev")
    try:
        replica = await operators.start(ready=False)
        await until(lambda: _says(replica, "are the CRDs installed"), "the log says what is missing")
        assert await replica.status("/livez") == 200
        assert await replica.status("/readyz") == 503
    finally:
        kubectl("apply", "--server-side", "-f", "crds/rlhf.dev_decisions.yaml")
    await until(lambda: _ready(replica), "it is ready", log=replica.log)


async def _two(world: Cluster, operators: Operators) -> tuple[Replica, Replica]:
    """The leader and the follower."""
    first = await operators.start()
    await until(first.is_leader, "the first replica leads", log=first.log)
    second = await operators.start()
    assert not await second.is_leader()
    assert world.namespace
    return first, second


async def _running(world: Cluster, name: str) -> bool:
    return (await world.phases()).get(name) == "Running" and f"{name}-a1" in await world.jobs()


async def _ended(replica: Replica) -> bool:
    return replica.process.poll() is not None


async def _ready(replica: Replica) -> bool:
    return await replica.status("/readyz") == 200


async def _says(replica: Replica, words: str) -> bool:
    return words in replica.text()
