"""From watch events to the store and the queue: the only place that knows kopf's decorators.

Only `on.event`: it is level-triggered, writes nothing and keeps no state. What an event means is decided elsewhere;
a handler takes the object in and wakes whom it concerns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import aiohttp
import kopf

from rlhf_operator.engine.gate import DecisionGate
from rlhf_operator.engine.sources import Source
from rlhf_operator.engine.store import Store
from rlhf_operator.kinds.base import Key, Resource
from rlhf_operator.kube.api import Api, path_of
from rlhf_operator.obs.metrics import Metrics
from rlhf_operator.watch.storages import NoDiffBase, NoProgress

SERVER_SECONDS = 150  # how long one watch request lasts; a working watch is answered at least this often
INACTIVE_SECONDS = 70.0  # bookmarks come every minute

Wake = Callable[[Iterable[Key]], None]


class WatchClock:
    """When each watched path was last answered: a watch that died without a word grows old here."""

    def __init__(self, paths: Iterable[tuple[str, str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.only(paths)

    def only(self, paths: Iterable[tuple[str, str]]) -> None:
        """From now on these; all count as answered now."""
        self._plurals = dict(paths)  # path -> plural
        self._answered = dict.fromkeys(self._plurals, self._clock())

    def answered(self, path: str) -> None:
        if path in self._answered:
            self._answered[path] = self._clock()

    def ages(self) -> dict[str, float]:
        """Seconds by plural; of several namespaces the oldest."""
        now = self._clock()
        ages: dict[str, float] = {}
        for path, at in self._answered.items():
            plural = self._plurals[path]
            ages[plural] = max(ages.get(plural, 0.0), now - at)
        return ages


def watched_paths(sources: Iterable[Source], namespaces: Sequence[str]) -> list[tuple[str, str]]:
    paths = []
    for source in sources:
        scopes: Sequence[str | None] = (None,) if source.cluster_scoped or not namespaces else namespaces
        paths += [(path_of(source.resource, namespace), source.resource.plural) for namespace in scopes]
    return paths


def settings(sources: Iterable[Source]) -> kopf.OperatorSettings:
    made = kopf.OperatorSettings()
    made.persistence.diffbase_storage = NoDiffBase()
    made.persistence.progress_storage = NoProgress()
    made.persistence.finalizer = "rlhf.dev/never-set"
    made.posting.enabled = False
    made.peering.standalone = True
    made.scanning.disabled = True  # the CRDs are known to be served, and the namespaces are named
    made.execution.max_workers = 1  # there is no synchronous handler
    made.queueing.idle_timeout = 1.0
    made.networking.connect_timeout = 10.0
    made.networking.request_timeout = 30.0
    made.watching.connect_timeout = 10.0
    made.watching.server_timeout = SERVER_SECONDS
    made.watching.client_timeout = SERVER_SECONDS + 10.0
    made.watching.inactivity_timeout = INACTIVE_SECONDS
    made.watching.reconnect_backoff = 1.0
    made.watching.chunk_size = 500
    for source in sources:
        if source.labels:
            made.watching.label_selectors[_selects(source.resource)] = source.labels
        if source.fields:
            made.watching.field_selectors[_selects(source.resource)] = source.fields
    return made


def _selects(resource: Resource) -> Callable[[Any], bool]:
    return lambda candidate: (candidate.group, candidate.plural) == (resource.group, resource.plural)


def registry(
    sources: Iterable[Source],
    gates: Iterable[Source],
    store: Store,
    gate: DecisionGate,
    wake: Wake,
    metrics: Metrics,
) -> kopf.OperatorRegistry:
    """One handler per source. `gates` are those of the two objects of the Decision policy that may be watched."""
    made = kopf.OperatorRegistry()
    for source in sources:
        _watch(made, source.resource, _into_store(source.resource, store, wake, metrics))
    for source in gates:
        _watch(made, source.resource, _into_gate(source.resource, store, gate, wake))
    return made


def login(made: kopf.OperatorRegistry, api: Api, clock: WatchClock) -> None:
    """kopf logs in through our own connection: one login, one way of refreshing tokens, and answers are seen."""

    async def authorize(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers.update(await api.authorization())
        answer = await handler(request)
        if answer.status == 200:
            clock.answered(request.url.path)
        return answer

    async def session(**_: Any) -> kopf.AiohttpSession:
        connector = aiohttp.TCPConnector(limit=0, ssl=api.tls)
        made_session = aiohttp.ClientSession(connector=connector, middlewares=(authorize,), proxy=api.proxy)
        return kopf.AiohttpSession(server=api.server, default_namespace=None, aiohttp_session=made_session)

    kopf.on.login(registry=made)(session)


def _watch(made: kopf.OperatorRegistry, resource: Resource, handler: Any) -> None:
    kopf.on.event(
        group=resource.group,
        version=resource.version,
        plural=resource.plural,
        id=f"see-{resource.plural}",
        registry=made,
    )(handler)


def _into_store(resource: Resource, store: Store, wake: Wake, metrics: Metrics) -> Any:
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        # Items of a listing carry neither kind nor apiVersion.
        obj: Any = {**event["object"], "kind": resource.kind, "apiVersion": resource.api_version}
        woken = store.remove(obj) if event["type"] == "DELETED" else store.put(obj)
        metrics.watch_events.labels(resource.plural, "yes" if woken else "no").inc()
        wake(woken)

    return see


def _into_gate(resource: Resource, store: Store, gate: DecisionGate, wake: Wake) -> Any:
    async def see(event: kopf.RawEvent, **_: Any) -> None:
        live = None if event["type"] == "DELETED" else event["object"]
        if gate.put(resource.kind, live):
            wake(store.all_keys())

    return see
