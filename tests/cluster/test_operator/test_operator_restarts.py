"""Restarts, crashes and lost events on a real API server: nothing is created twice, nothing is forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rlhf_operator.kinds.base import JOB, Resource
from rlhf_operator.kube.api import Api
from tests.cluster.test_operator.world import WIDGETS, Cluster, Operators, quiet, until
from tests.property.memory_api import Crash
from tests.property.toy import WIDGET
from tests.property.world import Clock, Engine

MANY, WORKERS = 1000, 16
WRITES = ("create", "replace", "merge", "apply", "patch_status", "delete")


async def test_a_restart_with_a_thousand_jobs_in_all_phases_creates_nothing_twice(
    world: Cluster, operators: Operators, control_plane
) -> None:
    names = [f"w{n:04}" for n in range(MANY)]
    since = datetime.now(UTC)
    first = await operators.start(workers=WORKERS)
    await world.create(names[: MANY - 100])
    await until(lambda: _jobs(world, MANY - 100), "the jobs are there", seconds=120, every=1.0, log=first.log)
    ending = [(f"{name}-a1", "Complete" if n % 3 else "Failed") for n, name in enumerate(names[:400])]
    half = len(ending) // 2
    await _end(world, ending[:half])
    first.kill()  # in the middle of its reaction
    await _end(world, ending[half:])
    await world.create(names[MANY - 100 :])

    second = await operators.start(workers=WORKERS)
    await until(
        lambda: _settled(world, ending), "everything is where it belongs", seconds=120, every=1.0, log=second.log
    )
    await quiet(second)

    created = Counter(
        r.name
        for r in control_plane.requests(since=since)
        if (r.namespace, r.verb, r.resource, r.code) == (world.namespace, "create", "jobs", 201)
    )
    live = Counter(job["metadata"]["labels"]["rlhf.dev/name"] for job in (await world.jobs()).values())
    assert len(live) == MANY
    assert set(live.values()) == {1}
    assert set(created.values()) == {1}, "a job that had been deleted came again"
    expected = {f"{name}-a1" for name in names}
    expected |= {name.replace("-a1", "-a2") for name, type in ending if type == "Failed"}
    assert set(created) <= expected
    # A request under way when its sender is killed takes effect and is recorded without an answer.
    assert len(expected - set(created)) <= WORKERS


async def test_a_crash_after_every_write_changes_nothing_on_a_real_server(world: Cluster) -> None:
    undisturbed = await _life(world, "calm", None)

    for k in range(1, undisturbed.writes + 1):
        name = f"crash{k}"
        crashing = await _life(world, name, k)
        assert crashing.crashes == 1
        assert _outcome(crashing.final) == _outcome(undisturbed.final)
        names = [job["metadata"]["name"] for job in (await world.jobs()).values()]
        assert sorted(n for n in names if n.startswith(f"{name}-")) == [f"{name}-a2"]


async def test_what_no_watch_reported_is_found_by_listing_again(world: Cluster) -> None:
    engine = Engine(
        (WIDGET,), world.api, Clock(), namespaces=[world.namespace]
    )  # it watches nothing: every event is lost
    await world.create(["kept", "changed", "deleted"], color="red")
    await engine.start()
    await _drain(engine)
    await world.api.delete(JOB, world.namespace, "kept-a1")
    await world.api.delete(WIDGETS, world.namespace, "deleted")
    live = await world.api.get(WIDGETS, world.namespace, "changed")
    await world.api.replace(WIDGETS, {**live, "spec": {"color": "blue"}})
    await world.create(["added"])

    async def listed_again() -> bool:  # the server's cache, from which is listed, may be a moment behind
        await engine.relister.once()
        await _drain(engine)
        jobs, configs = await world.jobs(), await world.config_maps()
        return {"kept-a1", "added-a1"} <= set(jobs) and configs["changed-config"]["data"]["color"] == "blue"

    await until(listed_again, "the store agrees with the server")
    assert engine.store.get("Widget", world.namespace, "deleted") is None
    assert await engine.relister.once() == 0


class CrashingApi:
    """The real client, in a process that dies after its k-th write."""

    def __init__(self, api: Api, crash_after: int | None) -> None:
        self._api = api
        self._crash_after = crash_after
        self.writes = 0
        self.crashes = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._api, name)
        if name not in WRITES:
            return call

        async def counted(resource: Resource, *arguments: Any, **named: Any) -> Any:
            answer = await call(resource, *arguments, **named)
            self.writes += 1
            if self.writes == self._crash_after:
                self.crashes += 1
                raise Crash
            return answer

        return counted


class Life:
    def __init__(self, api: CrashingApi, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.final: dict[str, Any] = {}

    @property
    def writes(self) -> int:
        return self.api.writes

    @property
    def crashes(self) -> int:
        return self.api.crashes


async def _life(world: Cluster, name: str, crash_after: int | None) -> Life:
    """One widget from its creation through a failed job to the end, by engines that know only what they list."""
    life = Life(CrashingApi(world.api, crash_after), world.namespace)
    await world.create([name])
    await _reconcile(life, name)
    await world.end_job(f"{name}-a1", "Failed")
    await _reconcile(life, name)
    await world.end_job(f"{name}-a2", "Complete")
    await _reconcile(life, name)
    before = life.api.writes
    await _reconcile(life, name)
    assert life.api.writes == before, "it writes at rest"
    live = await world.api.get(WIDGETS, world.namespace, name)
    assert live is not None
    life.final = live
    return life


async def _reconcile(life: Life, name: str) -> None:
    for _ in range(2):  # after a crash once more, with nothing remembered
        engine = Engine((WIDGET,), life.api, Clock(), namespaces=[life.namespace])
        try:
            await engine.relister.prime()
            engine.wake(key for key in engine.store.all_keys() if key.name == name)
            await _drain(engine)
            return
        except Crash:
            continue


async def _drain(engine: Engine) -> None:
    for _ in range(200):
        if await engine.work():
            continue
        deadline = engine.queue.next_deadline()
        if deadline is None or deadline > engine.queue._clock() + 60:
            return
        engine.queue._clock.seconds = deadline
    raise AssertionError("the engine does not come to rest")


def _outcome(widget: dict[str, Any]) -> tuple[Any, ...]:
    status = widget["status"]
    conditions = tuple((c["type"], c["status"], c["reason"]) for c in status["conditions"])
    return status["phase"], status["attempt"], tuple(o["result"] for o in status["outcomes"]), conditions


async def _end(world: Cluster, jobs: Sequence[tuple[str, str]]) -> None:
    await asyncio.gather(*(world.end_job(name, type) for name, type in jobs))


async def _jobs(world: Cluster, count: int) -> bool:
    return len((await world.api.list_metadata(JOB, world.namespace)).items) == count


async def _settled(world: Cluster, ending: Sequence[tuple[str, str]]) -> bool:
    jobs, phases = await world.jobs(), await world.phases()
    failed = {name.removesuffix("-a1") for name, type in ending if type == "Failed"}
    done = {name.removesuffix("-a1") for name, type in ending if type == "Complete"}
    return (
        len(jobs) == MANY
        and all(f"{name}-a2" in jobs and f"{name}-a1" not in jobs for name in failed)
        and all(phase == ("Succeeded" if name in done else "Running") for name, phase in phases.items())
        and len(await world.config_maps()) == MANY
    )
