"""/livez, /readyz and /metrics.

/livez fails on what only a restart cures: a watch that is answered no more, a pass that does not end, an event loop
that is blocked. An unreachable API server is not such a thing by itself, but it makes the watches old. /readyz tells
whether the store is primed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from rlhf_operator.obs.metrics import Metrics

WATCH_SECONDS = 240.0
PASS_SECONDS = 300.0
LAG_SECONDS = 10.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Problem:
    """Why a probe fails."""

    check: str
    message: str


Check = Callable[[], Iterable[Problem]]


def watches_fresh(ages: Callable[[], dict[str, float]], limit: float = WATCH_SECONDS) -> Check:
    def check() -> Iterable[Problem]:
        for plural, age in ages().items():
            if age > limit:
                yield Problem("watch", f"the watch of {plural} was last answered {age:.0f} s ago (limit {limit:.0f})")

    return check


def no_stuck_pass(longest: Callable[[], float], limit: float = PASS_SECONDS) -> Check:
    def check() -> Iterable[Problem]:
        if (age := longest()) > limit:
            yield Problem("worker", f"a pass has been running for {age:.0f} s (limit {limit:.0f})")

    return check


class LoopLag:
    """How late the event loop wakes a timer."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self.seconds = 0.0

    async def run(self) -> None:
        """Measures for ever; cancel it to stop."""
        while True:
            before = self._clock()
            await asyncio.sleep(_LOOK_SECONDS)
            self.seconds = max(0.0, self._clock() - before - _LOOK_SECONDS)
            self._metrics.loop_lag.set(self.seconds)

    def check(self) -> Iterable[Problem]:
        if self.seconds > LAG_SECONDS:
            yield Problem("loop", f"the event loop was blocked for {self.seconds:.1f} s (limit {LAG_SECONDS:.0f})")


class Server:
    """The HTTP server of the probes and the metrics. `port` 0 takes a free one; see `port` after `start`."""

    def __init__(
        self, metrics: Metrics, *, live: Iterable[Check], ready: Iterable[Check], measure: Callable[[], None]
    ) -> None:
        self._metrics = metrics
        self._measure = measure
        self.port = 0
        app = web.Application()
        app.router.add_get("/livez", _probe(tuple(live)))
        app.router.add_get("/readyz", _probe(tuple(ready)))
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)

    async def start(self, host: str, port: int) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _scrape(self, request: web.Request) -> web.Response:
        """All metrics, or those that the query names (`name[]`, as Prometheus' other clients take it).

        The facts of single objects are most of a scrape, and nothing else runs meanwhile: 21,000 samples of 1,600 jobs
        take a third of a second.
        """
        self._measure()
        registry: Collector = self._metrics.registry
        if names := request.query.getall("name[]", []):
            registry = self._metrics.registry.restricted_registry(names)
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _probe(checks: tuple[Check, ...]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        problems = [problem for check in checks for problem in check()]
        if not problems:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="".join(f"{p.check}: {p.message}\n" for p in problems))

    return answer
