"""A deduplicating work queue of keys.

* A key waiting twice is one key; a key added while it is worked on is worked on once more afterwards.
* A key is never in two workers at once.
* A delayed add keeps the earliest deadline; an immediate add replaces it.
* `retry` backs off exponentially with jitter, per key, until `forget`.
* Ready keys are handed out in the order of `lanes`.

It lives in memory only: names of children are deterministic, applies are idempotent, and a restart lists everything.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable, Container
from dataclasses import dataclass

from rlhf_operator.engine.lanes import Lanes
from rlhf_operator.kinds.base import Key
from rlhf_operator.obs.metrics import Metrics

_STALE = 64  # entries of moved and cancelled deadlines that the heap may hold, besides as many as there are deadlines


@dataclass(frozen=True)
class Backoff:
    """Seconds to wait after the n-th strike in a row: base * 2^n up to cap, of which the upper half is random."""

    base: float = 0.02
    cap: float = 60.0

    def delay(self, strikes: int, rng: random.Random) -> float:
        full: float = min(self.cap, self.base * 2.0 ** min(strikes, 32))
        return full * rng.uniform(0.5, 1.0)


class WorkQueue:
    """For one event loop. `try_get` is the whole logic; `get` only waits for it. `urgent`: kinds that go first."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        urgent: Container[str] = (),
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        backoff: Backoff = Backoff(),
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._rng = rng or random.Random()
        self._backoff = backoff
        self._ready = Lanes(urgent)
        self._deadlines: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._working: dict[Key, float] = {}
        self._again: set[Key] = set()
        self._strikes: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, key: Key) -> None:
        """As soon as a worker is free."""
        self._metrics.queue_adds.inc()
        self._deadlines.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key not in self._ready:
            self._ready.put(key, self._clock())
            self._changed.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """After `seconds`, unless it is wanted earlier."""
        deadline = self._clock() + seconds
        if key in self._ready or key in self._again or self._deadlines.get(key, deadline + 1) <= deadline:
            return
        self._deadlines[key] = deadline
        heapq.heappush(self._heap, (deadline, key))
        if len(self._heap) > 2 * len(self._deadlines) + _STALE:
            self._heap = [(at, key) for key, at in self._deadlines.items()]
            heapq.heapify(self._heap)
        self._changed.set()

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """After a backoff; returns its seconds."""
        strikes = self._strikes.get(key, 0)
        self._strikes[key] = strikes + 1
        delay = max(at_least, self._backoff.delay(strikes, self._rng))
        self._metrics.queue_retries.inc()
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """The key's last pass was fine: its next strike is the first."""
        self._strikes.pop(key, None)

    def gone(self, key: Key) -> None:
        """The key's object does not exist any more."""
        self.forget(key)
        self._ready.gone(key)

    def try_get(self) -> Key | None:
        """The next key to work on, if there is one now. Answer with `done`."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            deadline, key = heapq.heappop(self._heap)
            if self._deadlines.get(key) == deadline:  # else it was moved or cancelled
                self.add(key)
        taken = None if self._closed else self._ready.take()
        if taken is None:
            return None
        key, since = taken
        self._ready.looked_at(key)
        self._working[key] = now
        self._metrics.queue_wait.observe(now - since)
        return key

    def done(self, key: Key) -> None:
        started = self._working.pop(key)
        self._metrics.work_duration.observe(self._clock() - started)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        self._changed.set()

    async def get(self) -> Key | None:
        """Waits for the next key; None once the queue is closed."""
        while not self._closed:
            self._changed.clear()
            key = self.try_get()
            if key is not None:
                if self._ready:
                    self._changed.set()  # for the next worker
                return key
            timeout = None if self._heap == [] else max(0.0, self._heap[0][0] - self._clock())
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                continue
        self._changed.set()  # wake the next waiter, so that all of them end
        return None

    def open(self) -> None:
        """Keys are handed out (again)."""
        self._closed = False
        self._changed.set()

    def close(self) -> None:
        """No more keys are handed out: workers end after the one they hold."""
        self._closed = True
        self._changed.set()

    def clear(self) -> None:
        """Forgets everything that waits (leadership was lost)."""
        self._ready.clear()
        self._deadlines.clear()
        self._heap.clear()
        self._again.clear()
        self._strikes.clear()

    def next_deadline(self) -> float | None:
        """When the earliest delayed key is due, by the queue's clock."""
        return min(self._deadlines.values(), default=None)

    @property
    def idle(self) -> bool:
        """Nothing ready and nothing worked on; delayed keys may wait."""
        return not self._ready and not self._working

    def longest_running(self) -> float:
        """Age of the oldest pass under way, seconds."""
        return self._clock() - min(self._working.values()) if self._working else 0.0

    def measure(self) -> None:
        """Sets the gauges; called at a scrape."""
        now = self._clock()
        self._metrics.queue_depth.set(len(self._ready))
        self._metrics.queue_delayed.set(len(self._deadlines))
        self._metrics.unfinished_work.set(sum(now - started for started in self._working.values()))
        self._metrics.longest_running.set(self.longest_running())
        self._metrics.active_workers.set(len(self._working))
