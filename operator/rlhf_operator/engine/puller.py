"""Fetches what plans want to know from pods: HTTP GETs, repeated at a jittered interval.

Only the newest answer is kept. A key is woken when the body has changed or when pulling began or ceased to fail, not
at every answer: a quiet pod causes no passes. A missed pull is a fact for the plan to judge, never an error here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import aiohttp

from rlhf_operator.kinds.base import Key, Pull, Pulled
from rlhf_operator.obs.metrics import Metrics

_NOTHING = Pulled(body=None, at=None, error=None, failing_since=None)
_JITTER = 0.1
_MAX_BYTES = 1 << 20
TIMEOUT = 5.0

logger = logging.getLogger(__name__)

Fetch = Callable[[Pull], Awaitable[Any]]


class PullError(Exception):
    """A pull that brought no usable answer; the message says why."""


@dataclass
class _Loop:
    pull: Pull
    task: asyncio.Task[None]
    answer: Pulled = _NOTHING


class Puller:
    """`want` says what a key wants from now on; `answers` is what came."""

    def __init__(
        self,
        fetch: Fetch,
        wake: Callable[[Iterable[Key]], None],
        metrics: Metrics,
        *,
        now: Callable[[], datetime],
        rng: random.Random | None = None,
    ) -> None:
        self._fetch = fetch
        self._wake = wake
        self._metrics = metrics
        self._now = now
        self._rng = rng or random.Random()
        self._loops: dict[Key, dict[str, _Loop]] = {}

    def want(self, key: Key, pulls: Iterable[Pull]) -> None:
        """Starts what is new, stops what is not named any more, and restarts what has another URL or interval."""
        wanted = {pull.key: pull for pull in pulls}
        loops = self._loops.get(key, {})
        ended = {name: loop for name, loop in loops.items() if wanted.get(name) != loop.pull}
        for name, loop in ended.items():
            del loops[name]
            loop.task.cancel()
        for name, pull in wanted.items():
            if name not in loops:
                task = asyncio.create_task(self._repeat(key, pull), name=f"pull-{key.name}-{name}")
                before = ended.get(name)
                kept = before is not None and before.pull.url == pull.url
                loops[name] = _Loop(pull, task, before.answer if before and kept else _NOTHING)
        if loops:
            self._loops[key] = loops
        else:
            self._loops.pop(key, None)

    def answers(self, key: Key) -> Mapping[str, Pulled]:
        """By Pull.key; what has not been answered or failed once is not there yet."""
        loops = self._loops.get(key, {})
        return {name: loop.answer for name, loop in loops.items() if loop.answer is not _NOTHING}

    def stop(self) -> None:
        """Stops everything (leadership was lost, or the process ends)."""
        for key in list(self._loops):
            self.want(key, ())

    async def _repeat(self, key: Key, pull: Pull) -> None:
        await asyncio.sleep(0)  # until `want` has filed this task
        while True:
            await self.once(key, pull)
            await asyncio.sleep(pull.every_seconds * self._rng.uniform(1 - _JITTER, 1 + _JITTER))

    async def once(self, key: Key, pull: Pull) -> None:
        started = time.perf_counter()
        error: str | None = None
        body: Any = None
        try:
            body = await self._fetch(pull)
        except PullError as failed:
            error = str(failed)
        self._metrics.pulls.labels("ok" if error is None else "error").inc()
        self._metrics.pull_seconds.observe(time.perf_counter() - started)
        loop = self._loops.get(key, {}).get(pull.key)
        if loop is None or loop.pull != pull:
            return
        before, loop.answer = loop.answer, self._merged(loop.answer, body, error)
        flipped = (before.error is None) != (error is None)
        if flipped or before is _NOTHING or (error is None and before.body != body):
            self._wake((key,))

    def _merged(self, before: Pulled, body: Any, error: str | None) -> Pulled:
        now = self._now()
        if error is None:
            return Pulled(body=body, at=now, error=None, failing_since=None)
        return replace(before, error=error, failing_since=before.failing_since or now)


def http_fetch(session: aiohttp.ClientSession, token: Callable[[], str | None], timeout: float = TIMEOUT) -> Fetch:
    """GETs JSON. `token` is asked at each authenticated request: tokens are renewed on disk."""

    async def fetch(pull: Pull) -> Any:
        headers = {"Accept": "application/json"}
        if pull.authenticated:
            secret = token()
            if secret is None:
                raise PullError("this operator has no token to show to gateways: its pod must mount one")
            headers["Authorization"] = f"Bearer {secret}"
        try:
            async with session.get(
                pull.url, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout), allow_redirects=False
            ) as answer:
                raw = await answer.content.read(_MAX_BYTES + 1)
                while len(raw) <= _MAX_BYTES and not answer.content.at_eof():
                    raw += await answer.content.read(_MAX_BYTES + 1 - len(raw))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise PullError(f"GET {pull.url}: {type(error).__name__}: {error}".rstrip(": ")) from error
        if answer.status != 200:
            raise PullError(f"GET {pull.url}: HTTP {answer.status}")
        if len(raw) > _MAX_BYTES:
            raise PullError(f"GET {pull.url}: more than {_MAX_BYTES} bytes")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise PullError(f"GET {pull.url}: not JSON: {error}") from error

    return fetch
