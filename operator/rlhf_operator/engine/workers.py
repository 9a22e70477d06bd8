"""Takes keys from the queue and passes over them, and puts back what has to be looked at again."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from rlhf_operator.engine.queue import WorkQueue
from rlhf_operator.engine.reconciler import Ended, Reconciler, Result
from rlhf_operator.kinds.base import Key
from rlhf_operator.obs.logging import bound
from rlhf_operator.obs.metrics import Metrics

logger = logging.getLogger(__name__)


class Workers:
    """`count` tasks over one queue, between `start` and `drain`."""

    def __init__(self, queue: WorkQueue, reconciler: Reconciler, metrics: Metrics, *, count: int) -> None:
        self._queue = queue
        self._reconciler = reconciler
        self._metrics = metrics
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []
        metrics.max_concurrent_reconciles.set(count)

    def start(self) -> None:
        self._queue.open()
        self._tasks = [asyncio.create_task(self._work(), name=f"worker-{n}") for n in range(self._count)]

    async def drain(self, seconds: float) -> None:
        """No new passes; waits for those under way, and cancels what takes longer."""
        self._queue.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._tasks = []
        self._queue.clear()

    async def _work(self) -> None:
        while (key := await self._queue.get()) is not None:
            try:
                await process(self._queue, self._reconciler, self._metrics, key)
            finally:
                self._queue.done(key)


async def process(
    queue: WorkQueue,
    reconciler: Reconciler,
    metrics: Metrics,
    key: Key,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """One pass and its consequences for the queue."""
    started = clock()
    primary = reconciler.store.primary(key)
    uid = primary["metadata"].get("uid", "") if primary else ""
    with bound(kind=key.kind, namespace=key.namespace, name=key.name, uid=uid, reconcile=uuid.uuid4().hex[:12]):
        try:
            result = await reconciler.reconcile(key)
        except Exception:  # a defect of the engine: the other objects must not pay for it
            logger.exception("the pass failed")
            result = Result(Ended.ERROR)
    _schedule(queue, key, result)
    metrics.reconcile.labels(key.kind, result.ended.value).inc()
    metrics.reconcile_time.labels(key.kind).observe(clock() - started)
    if result.ended is Ended.ERROR:
        metrics.reconcile_errors.labels(key.kind).inc()
    elif result.ended is Ended.TERMINAL:
        metrics.terminal_reconcile_errors.labels(key.kind).inc()
    return result


def _schedule(queue: WorkQueue, key: Key, result: Result) -> None:
    match result.ended:
        case Ended.WROTE | Ended.REQUEUE:
            queue.retry(key)  # at once, unless it happens again and again
        case Ended.ERROR:
            queue.retry(key, at_least=result.after or 0.0)
        case Ended.GONE:
            queue.gone(key)
        case _:
            queue.forget(key)
            if result.after is not None:
                queue.add_after(key, result.after)
