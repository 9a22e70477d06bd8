"""Lists everything again now and then and repairs what the watches missed.

After a 410 a watch starts over with a listing, and nothing reports what was deleted in between: such ghosts stay for
ever. Compared are uids and resourceVersions of metadata from the server's cache, which may be older than what the
watches brought, so every suspicion is confirmed by reading the object itself before anything is changed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf_operator.api.decision import POLICY_NAME
from rlhf_operator.engine.gate import DecisionGate
from rlhf_operator.engine.sources import Source, gate_sources
from rlhf_operator.engine.store import Id, Store
from rlhf_operator.kinds.base import Key, Object
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.interface import KubeApi
from rlhf_operator.obs.metrics import Metrics

GRACE_SECONDS = 5.0  # what is merely under way arrives within it
_JITTER = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Suspect:
    source: Source
    ident: Id


class Relister:
    def __init__(
        self,
        sources: Sequence[Source],
        namespaces: Sequence[str],
        store: Store,
        gate: DecisionGate,
        api: KubeApi,
        metrics: Metrics,
        wake: Callable[[Iterable[Key]], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._sources = sources
        self._namespaces: Sequence[str | None] = namespaces or (None,)
        self._store = store
        self._gate = gate
        self.gates: tuple[Source, ...] = ()  # those of the Decisions' policy that we may watch; known once primed
        self._api = api
        self._metrics = metrics
        self._wake = wake
        self._sleep = sleep
        self._rng = rng or random.Random()

    async def prime(self) -> None:
        """Fills the store by full listings. Raises ApiError."""
        for source in self._sources:
            for namespace in self._namespaces:
                listing = await self._api.list(source.resource, namespace, labels=source.labels, fields=source.fields)
                for obj in listing.items:
                    self._store.put(obj)
        self.gates = tuple([source for source in gate_sources() if await self._prime_gate(source)])

    async def run(self, *, first: float, every: float) -> None:
        """For ever; cancel it to stop."""
        await self._sleep(first)
        while True:
            try:
                await self.once()
            except ApiError as error:
                logger.warning("listing again failed, next try in %.0f s: %s", every, error)
            await self._sleep(every * self._rng.uniform(1 - _JITTER, 1 + _JITTER))

    async def once(self) -> int:
        """One round; returns how many objects were repaired."""
        await self._look_at_gate()
        listed = {(s, ns): await self._list(s, ns) for s in self._sources for ns in self._namespaces}
        if not any(self._suspects(s, ns, seen) for (s, ns), seen in listed.items()):
            return 0
        await self._sleep(GRACE_SECONDS)
        suspects = [x for (s, ns), seen in listed.items() for x in self._suspects(s, ns, seen)]
        return sum([await self._repair(suspect) for suspect in suspects])

    async def _prime_gate(self, source: Source) -> bool:
        """Without the right to see the policy, Decisions are not honoured, and everything else works."""
        try:
            listing = await self._api.list(source.resource, fields=source.fields)
        except ApiError as error:
            if error.outcome is not Outcome.FORBIDDEN:
                raise
            logger.warning("Decisions are not honoured: the operator may not watch their policy: %s", error)
            return False
        for obj in listing.items:
            self._gate.put(source.resource.kind, obj)
        return True

    async def _look_at_gate(self) -> None:
        """A policy whose deletion nobody reported must not keep the gate open."""
        for source in self.gates:
            live = await self._api.get(source.resource, "", POLICY_NAME)
            if self._gate.put(source.resource.kind, live):
                self._wake(self._store.all_keys())

    async def _list(self, source: Source, namespace: str | None) -> dict[Id, Object]:
        listing = await self._api.list_metadata(source.resource, namespace, labels=source.labels, fields=source.fields)
        kind = source.resource.kind
        return {Id(kind, o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in listing.items}

    def _suspects(self, source: Source, namespace: str | None, listed: dict[Id, Object]) -> list[_Suspect]:
        known = {
            ident: obj
            for ident, obj in self._store.of_kind(source.resource.kind).items()
            if namespace is None or ident.namespace == namespace
        }
        ghosts = [ident for ident in known if ident not in listed]
        behind = [ident for ident, seen in listed.items() if _is_behind(known.get(ident), seen)]
        return [_Suspect(source, ident) for ident in (*ghosts, *behind)]

    async def _repair(self, suspect: _Suspect) -> int:
        """1 if the store was wrong."""
        ident, resource = suspect.ident, suspect.source.resource
        known = self._store.get(*ident)
        live = await self._api.get(resource, ident.namespace, ident.name)
        if live is not None:
            live = {**live, "kind": resource.kind, "apiVersion": resource.api_version}
            before = known["metadata"].get("resourceVersion") if known else None
            woken = self._store.put(live)
            self._wake(woken)
            repaired = bool(woken) and live["metadata"].get("resourceVersion") != before
        elif known is not None:
            self._wake(self._store.remove(known))
            repaired = True
        else:
            return 0
        if repaired:
            self._metrics.store_ghosts.labels(ident.kind).inc()
            logger.warning("no watch had reported what happened to %s %s/%s", *ident)
        return int(repaired)


def _is_behind(known: Object | None, listed: Object) -> bool:
    if known is None or known["metadata"].get("uid") != listed["metadata"].get("uid"):
        return True
    have, seen = known["metadata"].get("resourceVersion", ""), listed["metadata"].get("resourceVersion", "")
    return have.isdecimal() and seen.isdecimal() and int(have) < int(seen)
