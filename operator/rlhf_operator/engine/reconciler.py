"""One pass over one object: observe, plan, execute.

Executed in this order: deletes, creates, applies, the status (only if it differs), events (only with a status
written), pulls. With `status_first` the status goes first. Killing the process after any write changes nothing: the
next pass starts from what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from rlhf_operator.api.labels import GROUP, VERSION
from rlhf_operator.engine.apply import merge_patch
from rlhf_operator.engine.executor import Executor
from rlhf_operator.engine.failures import Broken, Failure, Reason, Terminal, Wait, from_api, overlay
from rlhf_operator.engine.gate import DecisionGate
from rlhf_operator.engine.puller import Puller
from rlhf_operator.engine.store import Store
from rlhf_operator.kinds.base import Event, Key, KindSpec, Object, Observed, Plan, Resource, Settings
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.events import Recorder
from rlhf_operator.kube.interface import KubeApi
from rlhf_operator.obs.metrics import Metrics

TERMINAL_SECONDS = 600.0  # what is in the way may go without any event that we see
MIN_REQUEUE = 0.1

logger = logging.getLogger(__name__)


class Ended(StrEnum):
    """How a pass ended; the label `result` of rlhf_operator_reconcile_total."""

    SUCCESS = "success"  # nothing was to be done
    WROTE = "wrote"  # look once more: what was written may lead on
    REQUEUE = "requeue"  # overtaken by another writer: again at once
    WAIT = "wait"
    TERMINAL = "terminal"
    ERROR = "error"
    GONE = "gone"


_RESTING = (Ended.SUCCESS, Ended.WAIT, Ended.TERMINAL)


@dataclass(frozen=True)
class Result:
    ended: Ended
    after: float | None = None  # seconds


def primary_resource(spec: KindSpec) -> Resource:
    return Resource(GROUP, VERSION, spec.kind, spec.plural)


@dataclass(frozen=True)
class Reconciler:
    """Holds what every pass needs; `reconcile` is one pass."""

    kinds: Mapping[str, KindSpec]
    store: Store
    api: KubeApi
    recorder: Recorder
    puller: Puller
    settings: Settings
    metrics: Metrics
    now: Callable[[], datetime]
    gate: DecisionGate
    wake: Callable[[Iterable[Key]], None]

    async def reconcile(self, key: Key) -> Result:
        """Raises only on a defect of the engine itself."""
        primary = self.store.primary(key)
        if primary is None or "deletionTimestamp" in primary["metadata"]:
            self.puller.want(key, ())
            return Result(Ended.GONE)
        spec = self.kinds[key.kind]
        return await _Pass(self, spec, key, primary).run()


class _Pass:
    def __init__(self, engine: Reconciler, spec: KindSpec, key: Key, primary: Object) -> None:
        self._engine = engine
        self._spec = spec
        self._key = key
        self._primary = primary
        self._resource = primary_resource(spec)
        self._wrote = False
        self._settled: Mapping[str, Any] | None = None  # the status that the live one was last brought to
        self._now = engine.now()

    async def run(self) -> Result:
        observed = self._observe()
        try:
            plan = self._spec.plan(observed)
        except Exception as error:  # a defect of one plan must not stop the others: it is shown, counted and retried
            plan = Plan(status=self._primary.get("status") or {})
            return await self._finish(plan.status, (), self._panic(error))
        result = await self._execute(plan)
        self._engine.puller.want(self._key, plan.pulls)
        return result

    def _observe(self) -> Observed:
        engine, key = self._engine, self._key
        honoured, decisions = engine.gate.open, engine.store.decisions(key)
        return Observed(
            primary=self._primary,
            children=engine.store.children(key),
            related=engine.store.related(key),
            decisions=tuple(filter(engine.gate.binds, decisions)) if honoured else (),
            decisions_honoured=honoured,
            pulled=engine.puller.answers(key),
            now=self._now,
            settings=engine.settings,
        )

    def _panic(self, error: Exception) -> Broken:
        self._engine.metrics.reconcile_panics.labels(self._key.kind).inc()
        logger.error("planning failed", exc_info=error)
        return Broken(
            Reason.INTERNAL_ERROR,
            f"planning failed with {type(error).__name__}: {error}. This is a defect of the operator, not of this "
            "object; its log has the details. It tries again.",
        )

    async def _execute(self, plan: Plan) -> Result:
        failure: Failure | None = None
        events = plan.events
        executor = Executor(self._spec.children, self._primary, self._engine.store, self._engine.api, self._put)
        try:
            if plan.status_first and await self._patch_status(self._keep_condition(plan.status)):
                self._record(events)
                events = ()
            await executor.delete(plan.delete)
            await executor.create(plan.create)
            await executor.apply(plan.apply)
        except (Wait, Terminal, Broken) as error:
            failure = error
        except ApiError as error:
            failure = from_api(error)
            if failure is None:
                return await self._again(error)
        finally:
            self._wrote |= executor.wrote
        result = await self._finish(plan.status, events, failure)
        if result.ended in _RESTING and plan.requeue_after is not None:
            due = max(MIN_REQUEUE, plan.requeue_after)  # whatever stands in the way of something else
            return Result(result.ended, due if result.after is None else min(due, result.after))
        return result

    async def _finish(self, status: Mapping[str, Any], events: tuple[Event, ...], failure: Failure | None) -> Result:
        try:
            patched = await self._patch_status(self._with_failure(status, failure))
        except ApiError as error:
            return await self._again(error)
        if patched:
            self._record(events if failure is None else (*events, _event(failure)))
        match failure:
            case None:
                return Result(Ended.WROTE if self._wrote else Ended.SUCCESS)
            case Wait():
                return Result(Ended.WAIT, failure.after)
            case Terminal():
                return Result(Ended.TERMINAL, TERMINAL_SECONDS)
            case Broken():
                return Result(Ended.ERROR)

    def _with_failure(self, status: Mapping[str, Any], failure: Failure | None) -> dict[str, Any]:
        if failure is None:
            return dict(status)
        logger.warning("%s: %s", failure.reason, failure.message)
        return overlay(
            status,
            failure,
            live=self._primary.get("status") or {},
            type=self._spec.error_condition,
            generation=self._primary["metadata"].get("generation", 0),
            now=self._now,
        )

    async def _patch_status(self, status: Mapping[str, Any]) -> bool:
        if status == self._settled:
            return False
        self._settled = status
        patch = merge_patch(self._primary.get("status") or {}, status)
        if not patch:
            return False
        meta = self._primary["metadata"]
        answer = await self._engine.api.patch_status(
            self._resource, meta["namespace"], meta["name"], patch, meta["resourceVersion"]
        )
        self._put(answer)
        self._primary = answer
        self._wrote = True
        return True

    def _keep_condition(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """Before the actions, a failure that the engine reported stays: whether it still holds is known only after
        them, and a condition must not flicker."""
        type, live = self._spec.error_condition, (self._primary.get("status") or {}).get("conditions") or ()
        kept = [c for c in live if c.get("type") == type and c.get("reason") in set(Reason)]
        if not kept:
            return dict(status)
        planned = list(status.get("conditions") or ())
        if all(c.get("type") != type for c in planned):
            planned += kept
        return {**status, "conditions": [kept[0] if c.get("type") == type else c for c in planned]}

    async def _again(self, error: ApiError) -> Result:
        """A failure that says nothing about the object: it was overtaken, or the API server is unwell."""
        if error.outcome not in (Outcome.CONFLICT, Outcome.ABSENT, Outcome.EXISTS, Outcome.EXPIRED):
            logger.warning("%s", error)
            return Result(Ended.ERROR, error.retry_after)
        try:
            live = await self._engine.api.get(self._resource, self._key.namespace, self._key.name)
        except ApiError as second:
            return Result(Ended.ERROR, second.retry_after)
        if live is None:
            woken = self._engine.store.remove(self._primary)
            self._engine.wake(woken - {self._key})
        else:
            self._put(live)
        return Result(Ended.REQUEUE)

    def _put(self, answer: Object) -> None:
        """Our own write is read at once: the next pass must not wait for the watch. Others who look at the object
        are woken; we ourselves look again by our result, with a backoff that keeps a restless plan from spinning."""
        self._engine.wake(self._engine.store.put(answer) - {self._key})

    def _record(self, events: Iterable[Event]) -> None:
        for event in events:
            self._engine.recorder.record(self._primary, event)


def _event(failure: Failure) -> Event:
    return Event("Warning", str(failure.reason), failure.message)
