"""The real engine in a world of its own: an API in memory, a kubelet, a user, a clock, and bad luck.

The engine is the one the operator runs (store, queue, workers' `process`, reconciler, relister); only its transport
and its clock are others. A `Story` says what users want and how pods end; `Luck` says in which order things happen
and what goes wrong. The final state must depend on the story alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from rlhf_operator.engine.gate import DecisionGate
from rlhf_operator.engine.queue import WorkQueue
from rlhf_operator.engine.reconciler import Reconciler, primary_resource
from rlhf_operator.engine.relister import Relister
from rlhf_operator.engine.sources import sources
from rlhf_operator.engine.store import Store
from rlhf_operator.engine.workers import process
from rlhf_operator.kinds.base import JOB, Key, KindSpec, Pull, Pulled, Settings
from rlhf_operator.kube.events import EVENT, Recorder
from rlhf_operator.kube.interface import KubeApi
from rlhf_operator.obs.metrics import Metrics
from tests.property.memory_api import Crash, Dict, MemoryApi, WatchEvent

NAMESPACE = "toys"
START = datetime(2026, 1, 1, 12, tzinfo=UTC)
QUIET_SECONDS = 500.0  # deadlines farther away than this are not waited for


class NoPulls:
    """Pods that cannot be asked anything."""

    def want(self, _key: Key, _pulls: Iterable[Pull]) -> None: ...

    def answers(self, _key: Key) -> Mapping[str, Pulled]:
        return {}


@dataclass
class Story:
    """What is wanted: manifests, and which Jobs fail. Everything else follows."""

    manifests: Sequence[Dict]
    failing: frozenset[str] = frozenset()  # names of Jobs
    edits: Sequence[Callable[[MemoryApi], None]] = ()


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


class Engine:
    """One life of the operator's process."""

    def __init__(
        self, kinds: Sequence[KindSpec], api: KubeApi, clock: Clock, seed: int = 0, namespaces: Sequence[str] = ()
    ) -> None:
        self.metrics = Metrics()
        self.store = Store(kinds)
        self.gate = DecisionGate(self.metrics)
        self.queue = WorkQueue(self.metrics, clock=clock, rng=random.Random(seed))
        self.recorder = Recorder(api, self.metrics, instance="test", clock=clock, now=clock.now)
        self.reconciler = Reconciler(
            kinds={spec.kind: spec for spec in kinds},
            store=self.store,
            api=api,
            recorder=self.recorder,
            puller=NoPulls(),
            settings=Settings(trainer_image="trainer:test", gateway_image="gateway:test"),
            metrics=self.metrics,
            now=clock.now,
            gate=self.gate,
            wake=self.wake,
        )
        self.relister = Relister(
            sources(kinds), namespaces, self.store, self.gate, api, self.metrics, self.wake, sleep=_no_sleep
        )

    def wake(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.queue.add(key)

    async def start(self) -> None:
        await self.relister.prime()
        self.wake(self.store.all_keys())

    def see(self, event: WatchEvent) -> None:
        obj = {**event.object, "kind": event.resource.kind, "apiVersion": event.resource.api_version}
        self.wake(self.store.remove(obj) if event.type == "DELETED" else self.store.put(obj))

    async def work(self) -> bool:
        """One pass, if there is a key to work on."""
        key = self.queue.try_get()
        if key is None:
            return False
        try:
            await process(self.queue, self.reconciler, self.metrics, key)
        finally:
            self.queue.done(key)
        await self.recorder.drain()
        return True


async def _no_sleep(_: float) -> None:
    return None


@dataclass
class World:
    kinds: Sequence[KindSpec]
    story: Story
    api: MemoryApi = field(default_factory=MemoryApi)
    clock: Clock = field(default_factory=Clock)
    delivered: int = 0  # watch events the engine has seen, or will never see
    lives: int = 0
    engine: Engine = field(init=False)
    edits: list[Callable[[MemoryApi], None]] = field(init=False)

    async def begin(self) -> None:
        self.edits = list(self.story.edits)
        resources = {spec.kind: primary_resource(spec) for spec in self.kinds}
        for manifest in self.story.manifests:
            self.api.insert(resources[manifest["kind"]], manifest)
        await self.restart()

    async def restart(self) -> None:
        """A new process: nothing is left of the old one's memory."""
        while True:
            self.lives += 1
            self.engine = Engine(self.kinds, self.api, self.clock, seed=self.lives)
            self.delivered = len(self.api.events)
            try:
                await self.engine.start()
                return
            except Crash:
                continue

    async def work(self) -> bool:
        try:
            return await self.engine.work()
        except Crash:
            await self.restart()
            return True

    def deliver(self, count: int | None = None) -> int:
        events = self.api.events[self.delivered :][:count]
        for event in events:
            self.engine.see(event)
        self.delivered += len(events)
        return len(events)

    def lose_events(self) -> None:
        """The watch breaks, and what happened meanwhile is compacted away: 410, and a listing without deletions."""
        self.delivered = len(self.api.events)
        for resource in self.watched():
            for obj in self.api.select(resource):
                self.engine.see(WatchEvent(resource, "MODIFIED", obj))

    def drop_events(self, count: int) -> None:
        """Events that never arrive, though the watch believes it is fine."""
        self.delivered = min(len(self.api.events), self.delivered + count)

    def watched(self) -> list[Any]:
        return [source.resource for source in sources(self.kinds)]

    def kubelet(self) -> bool:
        """Ends the next running Job as the story says."""
        for job in self.api.of("jobs"):
            if not (job.get("status") or {}).get("conditions"):
                type = "Failed" if job["metadata"]["name"] in self.story.failing else "Complete"
                self.api.store(JOB, {**job, "status": {"conditions": [{"type": type, "status": "True"}]}})
                return True
        return False

    def user(self) -> bool:
        if not self.edits:
            return False
        self.edits.pop(0)(self.api)
        return True

    async def settle(self, limit: int = 2000) -> None:
        """Lets everything happen that will; fails if it never ends."""
        for _ in range(limit):
            moved = self.deliver() + await self.work()
            if moved:
                continue
            if self.user() or self.kubelet():
                continue
            self.api.collect_garbage()
            deadline = self.engine.queue.next_deadline()
            if self.delivered == len(self.api.events):
                if deadline is None or deadline > self.clock.seconds + QUIET_SECONDS:
                    return
                self.clock.seconds = deadline
        raise AssertionError(f"no rest after {limit} steps; the last writes: {self.api.writes[-6:]}")

    async def settle_after_faults(self) -> None:
        """The relister, not luck, must repair what the watches lost."""
        await self.settle()
        await self.relist()
        await self.settle()

    async def relist(self) -> None:
        await self.engine.relister.once()

    async def writes_at_rest(self) -> int:
        """How many writes happen when everything is looked at again though nothing has changed."""
        before = len(self.api.writes)
        for _ in range(3):
            self.engine.wake(self.engine.store.all_keys())
            await self.settle()
            self.clock.seconds += 60.0
        await self.restart()
        await self.settle()
        return len(self.api.writes) - before

    def state(self) -> dict[str, Any]:
        """Everything but Events, without what no two runs have in common."""
        return {
            "/".join(ref): _timeless(obj) for ref, obj in sorted(self.api.objects.items()) if ref.plural != EVENT.plural
        }

    def creations(self) -> dict[str, int]:
        """How often each child was created, by plural/name."""
        counts: dict[str, int] = {}
        for event in self.api.events:
            if event.type == "ADDED" and event.object["metadata"].get("ownerReferences"):
                name = f"{event.resource.plural}/{event.object['metadata']['name']}"
                counts[name] = counts.get(name, 0) + 1
        return counts


_VOLATILE = {"uid", "resourceVersion", "creationTimestamp", "generation", "observedGeneration", "lastTransitionTime"}
_VOLATILE |= {"rlhf.dev/uid", "rlhf.dev/desired-hash", "startTime", "endTime", "jobUid"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_timeless(item) for item in value]
    return value
