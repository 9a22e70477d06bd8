"""Which revisions are dead, as this pod sees it.

A refused connection is a fact, not a statistic: the revision is ejected at once, for this pod, and its conversations go
to stable until a probe succeeds. Anything softer (slow, 5xx, no connection in time, which may be this pod's own fault)
takes several probes in a row, and is otherwise left to the operator's tests. Both revisions are probed all the time, so
that a canary that died while idle is known before the next user meets it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Literal

import aiohttp

from rlhf_gateway.upstream import FailureKind
from rlhf_gateway.wire import Backend

log = logging.getLogger(__name__)

Probe = Literal["alive", "unwell", "dead"]
HEALTH_PATH = "/health"
UNWELL_PROBES = 3


class HealthTable:
    """Ejected revisions. Pure state; `note` is fed by probes and by failed requests."""

    def __init__(self, on_change: Callable[[str, bool], None] = lambda _revision, _ejected: None) -> None:
        self._unwell: dict[str, int] = {}
        self._ejected: set[str] = set()
        self._on_change = on_change

    def ejected(self, revision: str) -> bool:
        return revision in self._ejected

    def all_ejected(self) -> tuple[str, ...]:
        return tuple(sorted(self._ejected))

    def note(self, revision: str, probe: Probe) -> None:
        """Take in what a probe, or a user's request, found."""
        streak = 0 if probe == "alive" else self._unwell.get(revision, 0) + 1
        self._unwell[revision] = streak
        ejected = probe == "dead" or (probe == "unwell" and (streak >= UNWELL_PROBES or revision in self._ejected))
        if ejected != (revision in self._ejected):
            (self._ejected.add if ejected else self._ejected.discard)(revision)
            self._on_change(revision, ejected)

    def note_failure(self, revision: str, kind: FailureKind) -> None:
        """Take in how a user's request failed; only failures to connect say something about the endpoint."""
        if kind == "refused":
            self.note(revision, "dead")
        elif kind == "unreachable":
            self.note(revision, "unwell")

    def keep_only(self, revisions: Iterable[str]) -> None:
        """Forget revisions that are no longer routed to."""
        wanted = set(revisions)
        self._ejected &= wanted
        self._unwell = {revision: streak for revision, streak in self._unwell.items() if revision in wanted}


class Prober:
    """Probes every backend in force, forever."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        table: HealthTable,
        backends: Callable[[], tuple[Backend, ...]],
        every_seconds: float = 1.0,
        timeout_seconds: float = 2.0,
    ) -> None:
        self._session = session
        self._table = table
        self._backends = backends
        self._every = every_seconds
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def run(self) -> None:
        while True:
            await self.probe_all()
            await asyncio.sleep(self._every)

    async def probe_all(self) -> None:
        """One round: all backends at once."""
        backends = self._backends()
        found = await asyncio.gather(*(self._probe(backend) for backend in backends))
        for backend, probe in zip(backends, found, strict=True):
            self._table.note(backend.revision, probe)
        self._table.keep_only(backend.revision for backend in self._backends())

    async def _probe(self, backend: Backend) -> Probe:
        try:
            async with self._session.get(backend.url.rstrip("/") + HEALTH_PATH, timeout=self._timeout) as response:
                return "alive" if response.status < 300 else "unwell"
        except aiohttp.ClientConnectorError:
            return "dead"
        except (aiohttp.ClientError, TimeoutError, OSError):
            return "unwell"
