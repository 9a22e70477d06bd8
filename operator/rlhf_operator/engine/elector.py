"""Leader election by a coordination.k8s.io Lease.

The algorithm is client-go's: a lease counts as expired when it has not changed for its duration by the local
monotonic clock, so clocks of different machines are never compared. A leader that cannot renew for `renew_deadline`
steps down, before anybody else may step up. A Lease does not fence: status writes carry resourceVersions besides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf_operator.kinds.base import Resource
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.interface import KubeApi
from rlhf_operator.obs.metrics import Metrics

LEASE = Resource("coordination.k8s.io", "v1", "Lease", "leases")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """Seconds."""

    duration: float = 15.0
    renew_deadline: float = 10.0
    retry_period: float = 2.0


class Elector:
    def __init__(
        self,
        api: KubeApi,
        metrics: Metrics,
        *,
        namespace: str,
        name: str,
        identity: str,
        now: Callable[[], datetime],
        terms: Terms = Terms(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._metrics = metrics
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._now = now
        self._terms = terms
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._lease: dict[str, Any] | None = None  # as last seen; None: read it again
        self._seen = ("", "")  # holder and renewTime
        self._seen_at = 0.0  # when those last changed, by our clock
        self._renewed_at = 0.0
        self.is_leader = False
        metrics.leader.set(0)

    async def run(self, started: Callable[[], None], stopped: Callable[[], Awaitable[None]]) -> None:
        """Campaigns for ever; calls `started` and `stopped` as leadership comes and goes. Cancel it to stop."""
        while True:
            was_leader = self.is_leader
            await self.step()
            if self.is_leader and not was_leader:
                logger.info("this replica (%s) leads now", self._identity)
                started()
            elif was_leader and not self.is_leader:
                logger.warning("the lease was lost: this replica (%s) steps down", self._identity)
                await stopped()
            await self._sleep(self._pause())

    async def step(self) -> None:
        """Tries once to acquire or renew."""
        begun = self._clock()
        patience = self._terms.renew_deadline
        if self.is_leader:
            patience = max(0.1, self._renewed_at + self._terms.renew_deadline - begun)
        held = False
        try:
            async with asyncio.timeout(patience):
                held = await self._acquire_or_renew()
        except (ApiError, TimeoutError) as error:
            logger.warning("the lease could not be read or written: %s", error or "no answer in time")
        if held:
            self.is_leader, self._renewed_at = True, begun
        elif self.is_leader:
            taken = self._seen[0] not in ("", self._identity)
            self.is_leader = not taken and self._clock() - self._renewed_at < self._terms.renew_deadline
        self._metrics.leader.set(self.is_leader)

    def _pause(self) -> float:
        """Until the next try. A leader wakes when its time to renew is up: it must not lead on in its sleep."""
        pause = self._terms.retry_period * self._rng.uniform(0.8, 1.0)
        if not self.is_leader:
            return pause
        return min(pause, max(0.0, self._renewed_at + self._terms.renew_deadline - self._clock()))

    async def release(self) -> None:
        """Lets the next one lead at once. Only after the workers have stopped."""
        if not self.is_leader:
            return
        self.is_leader = False
        self._metrics.leader.set(0)
        try:
            # A renewal that was cancelled on its way may have arrived: then the lease must be read again.
            lease = self._lease or await self._api.get(LEASE, self._namespace, self._name)
            if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                await self._api.replace(LEASE, self._claim(lease, holder="", duration=1))
        except ApiError as error:
            logger.warning("the lease could not be released, it will expire: %s", error)

    async def _acquire_or_renew(self) -> bool:
        lease = self._lease
        if lease is None:
            lease = await self._api.get(LEASE, self._namespace, self._name)
        if lease is None:
            return await self._write(self._api.create(LEASE, self._claim(None, self._identity)))
        self._observe(lease)
        holder, _ = self._seen
        if holder not in ("", self._identity) and not self._expired(lease):
            self._lease = None
            return False
        return await self._write(self._api.replace(LEASE, self._claim(lease, self._identity)))

    async def _write(self, request: Awaitable[dict[str, Any]]) -> bool:
        self._lease = None
        try:
            answer = await request
        except ApiError as error:
            if error.outcome not in (Outcome.CONFLICT, Outcome.EXISTS, Outcome.ABSENT):
                raise
            # Somebody was faster, or removed it. Who holds it now must be known at once: a leader may have lost it.
            live = await self._api.get(LEASE, self._namespace, self._name)
            if live is not None:
                self._observe(live)
            return False
        self._observe(answer)
        self._lease = answer
        return True

    def _observe(self, lease: dict[str, Any]) -> None:
        spec = lease.get("spec") or {}
        seen = (spec.get("holderIdentity") or "", spec.get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()

    def _expired(self, lease: dict[str, Any]) -> bool:
        duration = (lease.get("spec") or {}).get("leaseDurationSeconds") or self._terms.duration
        return self._clock() - self._seen_at > float(duration)

    def _claim(self, lease: dict[str, Any] | None, holder: str, duration: float | None = None) -> dict[str, Any]:
        meta: dict[str, Any] = {"namespace": self._namespace, "name": self._name}
        before: dict[str, Any] = {}
        if lease is not None:
            meta["resourceVersion"] = lease["metadata"]["resourceVersion"]
            before = lease.get("spec") or {}
        moment = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changed = before.get("holderIdentity") != holder
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": math.ceil(duration or self._terms.duration),  # cut off, it would end too early
            "acquireTime": moment if changed else before.get("acquireTime", moment),
            "renewTime": moment,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + bool(changed and lease and holder),
        }
        return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": meta, "spec": spec}
