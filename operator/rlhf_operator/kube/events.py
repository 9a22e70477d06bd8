"""Kubernetes Events (events.k8s.io/v1) that do not flood anything.

One Event per (object, reason, message); what repeats is counted in its series and written at most every five
minutes. A token bucket per object and a bounded queue keep a broken plan from harming the API server: what does not
fit is dropped and counted. Events are best effort by Kubernetes' own contract; nothing may depend on them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from rlhf_operator.api.labels import FIELD_MANAGER
from rlhf_operator.kinds.base import Event, Object, Resource
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.interface import KubeApi
from rlhf_operator.obs.metrics import Metrics

EVENT = Resource("events.k8s.io", "v1", "Event", "events")
SERIES_SECONDS = 300.0
BURST = 25
REFILL_SECONDS = 12.0  # one more event per object
REMEMBERED = 4096
QUEUED = 1024
_NOTE_BYTES = 1024

logger = logging.getLogger(__name__)


class _Identity(NamedTuple):
    uid: str
    reason: str
    message: str


@dataclass
class _Series:
    identity: _Identity
    name: str
    namespace: str
    count: int = 1
    written_at: float = 0.0
    exists: bool = False


@dataclass
class _Bucket:
    tokens: float
    at: float


@dataclass
class _Item:
    series: _Series
    body: dict[str, Any] = field(default_factory=dict)  # of the Event to create; empty: only the series changed


class Recorder:
    """`record` never blocks and never fails; `run` writes what it queued."""

    def __init__(
        self,
        api: KubeApi,
        metrics: Metrics,
        *,
        instance: str,
        clock: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._metrics = metrics
        self._instance = instance
        self._clock = clock
        self._now = now
        self._series: OrderedDict[_Identity, _Series] = OrderedDict()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(QUEUED)

    @property
    def queued(self) -> int:
        return self._queue.qsize()

    def record(self, regarding: Object, event: Event) -> None:
        meta = regarding["metadata"]
        identity = _Identity(meta.get("uid", ""), event.reason, event.message)
        series = self._series.get(identity)
        if series is not None:
            self._series.move_to_end(identity)
            series.count += 1
            if self._clock() - series.written_at < SERIES_SECONDS:
                self._metrics.events.labels(result="folded").inc()
                return
            self._enqueue(_Item(series))
            return
        if not self._take_token(identity.uid):
            self._metrics.events.labels(result="dropped").inc()
            return
        series = _Series(identity, _name(meta["name"], identity), meta.get("namespace") or "default")
        self._series[identity] = series
        while len(self._series) > REMEMBERED:
            self._series.popitem(last=False)
        self._enqueue(_Item(series, self._body(regarding, event, series)))

    async def run(self) -> None:
        """Writes for ever; cancel it to stop."""
        while True:
            await self.write(await self._queue.get())

    async def drain(self) -> None:
        """Writes what is queued now."""
        while not self._queue.empty():
            await self.write(self._queue.get_nowait())

    async def write(self, item: _Item) -> None:
        try:
            if item.body and not item.series.exists:
                await self._create(item)
            else:
                await self._update(item.series)
        except ApiError as error:
            self._metrics.events.labels(result="failed").inc()
            self._series.pop(item.series.identity, None)  # expired or never arrived: the next one starts anew
            logger.warning("could not post an event: %s", error)

    def _enqueue(self, item: _Item) -> None:
        item.series.written_at = self._clock()
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self._metrics.events.labels(result="dropped").inc()

    async def _create(self, item: _Item) -> None:
        try:
            await self._api.create(EVENT, item.body)
            self._metrics.events.labels(result="posted").inc()
        except ApiError as error:
            if error.outcome is not Outcome.EXISTS:
                raise
            item.series.count += 1  # posted before this process started
            await self._update(item.series)
        item.series.exists = True

    async def _update(self, series: _Series) -> None:
        patch = {"series": {"count": series.count, "lastObservedTime": _micro(self._now())}}
        await self._api.merge(EVENT, series.namespace, series.name, patch)
        self._metrics.events.labels(result="series").inc()

    def _take_token(self, uid: str) -> bool:
        now = self._clock()
        bucket = self._buckets.setdefault(uid, _Bucket(BURST, now))
        self._buckets.move_to_end(uid)
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        bucket.tokens = min(BURST, bucket.tokens + (now - bucket.at) / REFILL_SECONDS)
        bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _body(self, regarding: Object, event: Event, series: _Series) -> dict[str, Any]:
        meta = regarding["metadata"]
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": series.name, "namespace": series.namespace},
            "eventTime": _micro(self._now()),
            "reportingController": FIELD_MANAGER,
            "reportingInstance": self._instance,
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason,
            "note": event.message.encode()[:_NOTE_BYTES].decode(errors="ignore"),
            "regarding": {
                "apiVersion": regarding["apiVersion"],
                "kind": regarding["kind"],
                "namespace": meta.get("namespace", ""),
                "name": meta["name"],
                "uid": meta.get("uid", ""),
                "resourceVersion": meta.get("resourceVersion", ""),
            },
        }


def _name(regarding: str, identity: _Identity) -> str:
    """Deterministic, so that a restarted operator finds its own Event instead of posting it twice."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    return f"{regarding}.{digest}"


def _micro(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
