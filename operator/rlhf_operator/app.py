"""Wiring: what is made of what, in which order it starts, and in which order it stops.

Start: serve probes, prime the store by listings, then watch, then campaign; workers run while this replica leads.
Stop: workers finish their pass, the lease is released, then the watches end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import kopf

from rlhf_gateway.wire import TOKEN_PATH
from rlhf_operator.config import Config
from rlhf_operator.engine import sources
from rlhf_operator.engine.elector import Elector, Terms
from rlhf_operator.engine.gate import DecisionGate
from rlhf_operator.engine.puller import Puller, http_fetch
from rlhf_operator.engine.queue import WorkQueue
from rlhf_operator.engine.reconciler import Reconciler
from rlhf_operator.engine.relister import Relister
from rlhf_operator.engine.store import Store
from rlhf_operator.engine.workers import Workers
from rlhf_operator.kinds.base import Key, KindSpec
from rlhf_operator.kube.api import Api
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.events import Recorder
from rlhf_operator.obs import health
from rlhf_operator.obs.metrics import Metrics, ObjectCollector
from rlhf_operator.watch import handlers

_FIRST_RELIST_SECONDS = 20.0
_PRIME_RETRY_SECONDS = 3.0
_STOP_SECONDS = 10.0

logger = logging.getLogger(__name__)


def _utcnow() -> datetime:
    return datetime.now(UTC)


def _version() -> str:
    """Of the installed distribution; an image that holds the sources alone has none."""
    try:
        return version("rlhf-operator")
    except PackageNotFoundError:
        return "unknown"


def _token() -> str | None:
    """What gateways are shown; read anew each time: the kubelet renews it."""
    try:
        return Path(TOKEN_PATH).read_text().strip()
    except OSError:
        return None


class App:
    """One replica of the operator, from `run` until a signal."""

    def __init__(self, config: Config, kinds: Sequence[KindSpec], api: Api, metrics: Metrics) -> None:
        self._config = config
        self._kinds = tuple(kinds)
        self._api = api
        self._metrics = metrics
        self._stop = asyncio.Event()
        self._primed = False
        self._leading = False
        self._failed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        self._sources = sources.sources(self._kinds)
        self._build()

    @classmethod
    async def create(cls, config: Config, kinds: Sequence[KindSpec], kubeconfig: Path | None) -> App:
        metrics = Metrics()
        api = await Api.connect(
            metrics,
            kubeconfig=kubeconfig,
            max_in_flight=config.api.max_in_flight,
            timeout_seconds=config.api.timeout_seconds,
        )
        return cls(config, kinds, api, metrics)

    def _build(self) -> None:
        config, api, metrics = self._config, self._api, self._metrics
        self._store = Store(self._kinds)
        self._queue = WorkQueue(metrics, urgent={spec.kind for spec in self._kinds if spec.serves_users})
        self._gate = DecisionGate(metrics)
        self._session = aiohttp.ClientSession()  # to pods; never with the API server's credentials
        self._puller = Puller(http_fetch(self._session, _token), self._wake, metrics, now=_utcnow)
        self._recorder = Recorder(api, metrics, instance=self._identity, clock=time.monotonic, now=_utcnow)
        self._workers = Workers(self._queue, self._make_reconciler(), metrics, count=config.workers)
        self._relister = Relister(self._sources, config.namespaces, self._store, self._gate, api, metrics, self._wake)
        self._elector = self._make_elector()
        self._lag = health.LoopLag(metrics)
        paths = handlers.watched_paths((*self._sources, *sources.gate_sources()), config.namespaces)
        self._watch_clock = handlers.WatchClock(paths)
        stuck = health.no_stuck_pass(self._queue.longest_running)
        live = (health.watches_fresh(self._watch_ages), stuck, self._lag.check)
        self._server = health.Server(metrics, live=live, ready=(self._check_primed,), measure=self._measure)
        metrics.build_info.labels(_version()).set(1)
        metrics.precreate((spec.kind for spec in self._kinds), (source.resource.kind for source in self._sources))
        if config.metrics.per_object:
            metrics.registry.register(ObjectCollector(self._store.primaries))

    def _make_reconciler(self) -> Reconciler:
        return Reconciler(
            kinds={spec.kind: spec for spec in self._kinds},
            store=self._store,
            api=self._api,
            recorder=self._recorder,
            puller=self._puller,
            settings=self._config.settings(),
            metrics=self._metrics,
            now=_utcnow,
            gate=self._gate,
            wake=self._wake,
        )

    def _make_elector(self) -> Elector:
        election = self._config.leader_election
        return Elector(
            self._api,
            self._metrics,
            namespace=self._config.operator_namespace,
            name=election.name,
            identity=self._identity,
            now=_utcnow,
            terms=Terms(
                duration=election.lease_duration_seconds,
                renew_deadline=election.renew_deadline_seconds,
                retry_period=election.retry_period_seconds,
            ),
        )

    @property
    def port(self) -> int:
        """Where the probes are served, once they are."""
        return self._server.port

    def stop(self) -> None:
        """Asks for a graceful end."""
        self._stop.set()

    async def run(self) -> int:
        """Until a signal (0) or until the watches fail (1)."""
        self._install_signals()
        await self._server.start(self._config.http.host, self._config.http.port)
        self._spawn(self._lag.run(), "loop-lag")
        try:
            await self._prime()
            if self._stop.is_set():
                return 0
            watching = await self._watch()
            self._campaign()
            await self._until_stopped(watching)
            await self._shut_down()
            return await self._end_watching(watching)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.stop()
            await self._session.close()
            await self._api.close()

    async def _prime(self) -> None:
        """Lists everything, until it works or we are told to stop."""
        while not self._stop.is_set():
            try:
                await self._relister.prime()
            except ApiError as error:
                hint = "; are the CRDs installed (chart rlhf-operator-crds)?" if error.outcome is Outcome.ABSENT else ""
                logger.error("cannot list yet, trying again: %s%s", error, hint)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PRIME_RETRY_SECONDS):
                        await self._stop.wait()
            else:
                watched = (*self._sources, *self._relister.gates)
                self._watch_clock.only(handlers.watched_paths(watched, self._config.namespaces))
                self._primed = True
                logger.info("the store is primed: %s", self._store.counts())
                return

    async def _watch(self) -> asyncio.Task[None]:
        gates = self._relister.gates
        registry = handlers.registry(self._sources, gates, self._store, self._gate, self._wake, self._metrics)
        handlers.login(registry, self._api, self._watch_clock)
        ours = asyncio.all_tasks()
        root = await kopf.spawn_tasks(
            registry=registry,
            settings=handlers.settings((*self._sources, *gates)),
            clusterwide=not self._config.namespaces,
            namespaces=self._config.namespaces,
        )
        self._install_signals()  # kopf has put its own in their place, which would end the watches first
        return asyncio.create_task(kopf.run_tasks(root, ignored=ours), name="watching")

    def _campaign(self) -> None:
        self._spawn(self._recorder.run(), "events")
        self._spawn(self._relister.run(first=_FIRST_RELIST_SECONDS, every=self._config.relist_seconds), "relister")
        if self._config.leader_election.enabled:
            self._spawn(self._elector.run(self._lead, self._step_down), "elector")
        else:
            self._lead()

    def _lead(self) -> None:
        self._leading = True
        self._wake(self._store.all_keys())
        self._workers.start()

    async def _step_down(self) -> None:
        election = self._config.leader_election
        spare = election.lease_duration_seconds - election.renew_deadline_seconds
        self._leading = False
        await self._workers.drain(min(self._config.drain_seconds, spare / 2))
        self._puller.stop()

    async def _until_stopped(self, watching: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(self._stop.wait(), name="stop-waiter")
        essential = {watching, *(task for task in self._tasks if not task.done())}
        await asyncio.wait({stopping, *essential}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                logger.critical("%s ended unexpectedly", task.get_name(), exc_info=error)
                self._failed = True

    async def _shut_down(self) -> None:
        logger.info("stopping")
        await self._workers.drain(self._config.drain_seconds)
        self._puller.stop()
        for task in [task for task in self._tasks if task.get_name() in ("elector", "events")]:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._elector.release()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._recorder.drain()

    async def _end_watching(self, watching: asyncio.Task[None]) -> int:
        crashed = watching.done()
        watching.cancel()
        done, _ = await asyncio.wait({watching}, timeout=_STOP_SECONDS)
        for task in done:
            if crashed and not task.cancelled() and (error := task.exception()):
                logger.critical("watching failed", exc_info=error)
        return 1 if crashed or self._failed else 0

    def _wake(self, keys: Iterable[Key]) -> None:
        """A replica that does not lead only keeps its store warm: when it leads, it looks at everything."""
        if self._leading:
            for key in keys:
                self._queue.add(key)

    def _watch_ages(self) -> dict[str, float]:
        return self._watch_clock.ages() if self._primed else {}

    def _check_primed(self) -> Iterable[health.Problem]:
        if not self._primed:
            yield health.Problem("store", "the first listing is not complete")

    def _measure(self) -> None:
        self._queue.measure()
        self._metrics.events_queued.set(self._recorder.queued)
        for kind, count in self._store.counts().items():
            self._metrics.store_objects.labels(kind).set(count)
        for plural, age in self._watch_clock.ages().items():
            self._metrics.watch_age.labels(plural).set(age)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        self._tasks.add(asyncio.create_task(coroutine, name=name))

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
