"""Wires one gateway together, runs it, and takes it down without losing an answer or a count."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from contextlib import AsyncExitStack

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rlhf_gateway.admin import Admin
from rlhf_gateway.auth import Guard
from rlhf_gateway.config_watch import ConfigWatch
from rlhf_gateway.evidence import Ledger
from rlhf_gateway.exchange import Parts
from rlhf_gateway.health import Prober
from rlhf_gateway.kube import KubeApi
from rlhf_gateway.metrics import Metrics
from rlhf_gateway.proxy import Proxy
from rlhf_gateway.records import Recorder
from rlhf_gateway.safety import FilterSlot
from rlhf_gateway.seat import Clerk
from rlhf_gateway.settings import Settings
from rlhf_gateway.shadow import Shadow
from rlhf_gateway.state import State
from rlhf_gateway.upstream import Upstream
from rlhf_gateway.wire import GatewayConfig

log = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 4.0  # below the 5 s after which common model servers close an idle connection
FILTER_RETRY_SECONDS = 5.0  # a claim may be filled after the rollout was written


class Gateway:
    """One gateway process. `start`, then `drain`, then `close`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.rollout)
        self.ledger = Ledger(settings.pod_uid, settings.epoch, settings.max_conversations)
        self.state = State(self.ledger, self.metrics, FilterSlot())
        self.metrics.attach(self.ledger, self.state.report)
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._filter_wanted = asyncio.Event()
        self._pulled = asyncio.Event()
        self._shadow: Shadow | None = None
        self._traffic: web.AppRunner | None = None
        self.ports: dict[str, int] = {}

    async def start(self) -> None:
        """Open the ports and follow the configuration."""
        settings = self.settings
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        )
        # The API has a session of its own: its watch must never wait behind users' traffic.
        api_session = await self._stack.enter_async_context(aiohttp.ClientSession())
        api = KubeApi(api_session, settings.api)
        recorder = Recorder(settings.rollout, settings.record_share, _print_line, random.Random())
        parts = Parts(self.state, Upstream(session, settings.limits), Clerk(self.state, recorder))
        self._shadow = Shadow(self.state, parts.upstream, parts.clerk, settings.shadow_limit)
        self._traffic = await self._serve("traffic", Proxy(parts, self._shadow).application(), settings.traffic_port)
        guard = Guard(api, settings.operator_username)
        await self._serve("admin", Admin(self.state, guard, self._pulled.set).application(), settings.admin_port)
        await self._serve("metrics", self._metrics_application(), settings.metrics_port)
        watch = ConfigWatch(api, settings.namespace, settings.config_map, self, random.Random())
        prober = Prober(session, self.state.health, self.state.backends, settings.probe_seconds)
        self._tasks = [asyncio.create_task(task) for task in (watch.run(), prober.run(), self._follow_filter())]

    def apply(self, config: GatewayConfig) -> None:
        """Put a configuration in force; its safety filter follows as soon as it is loaded."""
        self.state.apply(config)
        self._filter_wanted.set()

    def refuse(self, reason: str) -> None:
        self.state.refuse(reason)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain. Raises if a background task died: the pod must restart then."""
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([stopping, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        if stopping in done:
            await self.drain()
        else:
            stopping.cancel()
            await next(iter(done))

    async def drain(self) -> None:
        """Withdraw, finish the answers in flight, then stay readable until the last counts were pulled."""
        settings = self.settings
        self.state.draining = True
        log.info("draining: accepting for %g s more", settings.drain_accept_seconds)
        await asyncio.sleep(settings.drain_accept_seconds)
        if self._traffic is not None:
            for site in list(self._traffic.sites):
                await site.stop()  # no new connections; a request on an open one is still answered
            await self._quiet(settings.drain_answer_seconds)
            await self._traffic.cleanup()
        if self._shadow is not None:
            await self._shadow.finish()
        self._pulled.clear()
        try:
            async with asyncio.timeout(settings.drain_evidence_seconds):
                await self._pulled.wait()
            log.info("drained: the last counts were pulled")
        except TimeoutError:
            log.warning("drained: nobody pulled the last counts within %g s", settings.drain_evidence_seconds)

    async def close(self) -> None:
        """Close everything; what is still in flight is cut."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _quiet(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.state.flights.quiet()
        except TimeoutError:
            log.warning("cutting the answers still in flight after %g s: %s", seconds, self.state.flights.counts())

    async def _serve(self, name: str, app: web.Application, port: int) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, self.settings.host, port)
        await site.start()
        self.ports[name] = runner.addresses[0][1]
        return runner

    async def _follow_filter(self) -> None:
        while True:
            wanted = self.state.config.safety_filter if self.state.config is not None else None
            if self.state.safety.needs(wanted):
                await self.state.safety.use(wanted)
            try:
                async with asyncio.timeout(FILTER_RETRY_SECONDS):
                    await self._filter_wanted.wait()
            except TimeoutError:
                continue
            self._filter_wanted.clear()

    def _metrics_application(self) -> web.Application:
        async def metrics(_request: web.Request) -> web.Response:
            return web.Response(
                body=generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
            )

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        return app


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
