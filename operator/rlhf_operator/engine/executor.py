"""Writes children: deletes, creates, applies, in that order and each in the order of the plan.

Sequential on purpose: a plan may rely on its order, and a crash leaves a prefix. Nothing is ever written to an
object that is not the primary's: whoever else controls it, or nobody, is reported instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rlhf_operator.engine.apply import adopt, needs_apply, stamp
from rlhf_operator.engine.failures import Broken, Reason, Terminal, Wait
from rlhf_operator.engine.store import Id, Store, controller_of
from rlhf_operator.kinds.base import ChildRef, Object, Resource
from rlhf_operator.kube.errors import ApiError, Outcome
from rlhf_operator.kube.interface import KubeApi

_DELETION_SECONDS = 5.0


class Executor:
    """For one pass over `primary`. `put` takes every answer into the store."""

    def __init__(
        self,
        children: Iterable[Resource],
        primary: Object,
        store: Store,
        api: KubeApi,
        put: Callable[[Object], None],
    ) -> None:
        self._resources = {(r.api_version, r.kind): r for r in children}
        self._primary = primary
        self._store = store
        self._api = api
        self._put = put
        self.wrote = False

    async def delete(self, refs: Iterable[ChildRef]) -> None:
        """Deletes what is there and not on its way out already."""
        for ref in refs:
            live = self._store.get(ref.resource.kind, ref.namespace, ref.name)
            if live is None or _leaving(live) or ref.uid not in (None, live["metadata"]["uid"]):
                continue
            uid = live["metadata"]["uid"]
            answer = await self._api.delete(ref.resource, ref.namespace, ref.name, uid)
            self.wrote = True
            if answer is None:
                self._store.remove(live)
            else:
                self._put(answer)

    async def create(self, children: Iterable[Object]) -> None:
        """POSTs what is absent. What is there is never changed, whatever it looks like by now."""
        for child in children:
            body = adopt(child, self._primary)
            live = self._live(body)
            if live is None:
                await self._post(body)
            else:
                self._check_owner(live)

    async def apply(self, children: Iterable[Object]) -> None:
        """Server-side applies what differs from what is there."""
        for child in children:
            body = stamp(adopt(child, self._primary))
            resource, meta = self._resource(body), body["metadata"]
            live = self._live(body)
            if live is None:
                # Absent, or there without our labels: to force an apply could take over somebody's object.
                live = await self._api.get(resource, meta["namespace"], meta["name"])
                if live is not None:
                    self._check_owner(live)
                    self._put(live)
            else:
                self._check_owner(live)
            if live is not None and _leaving(live):
                continue  # its end will wake us
            if needs_apply(body, live):
                self._put(await self._api.apply(resource, body))
                self.wrote = True

    async def _post(self, body: dict[str, Any]) -> None:
        resource, meta = self._resource(body), body["metadata"]
        try:
            self._put(await self._api.create(resource, body))
        except ApiError as error:
            if error.outcome is not Outcome.EXISTS:
                raise
            live = await self._api.get(resource, meta["namespace"], meta["name"])
            if live is not None:  # else it went in between: the next pass creates it
                self._check_owner(live)
                self._put(live)
        self.wrote = True

    def _live(self, body: Object) -> Object | None:
        return self._store.get(*Id(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"]))

    def _resource(self, body: Object) -> Resource:
        try:
            return self._resources[body["apiVersion"], body["kind"]]
        except KeyError:
            message = (
                f"the plan asks for a {body['apiVersion']} {body['kind']}, which is not among the children of "
                f"{self._primary['kind']}. This is a defect of the operator: its KindSpec must declare that resource."
            )
            raise Broken(Reason.INTERNAL_ERROR, message) from None

    def _check_owner(self, live: Object) -> None:
        """Raises unless the primary controls `live`."""
        owner, ours = controller_of(live), self._primary["metadata"]
        what = f"{live['kind']} {live['metadata']['name']!r}"
        if owner is not None and owner["uid"] == ours["uid"]:
            return
        if _leaving(live):
            raise Wait(Reason.WAITING_FOR_DELETION, f"waiting for an older {what} to be deleted", _DELETION_SECONDS)
        if owner is not None and (owner["kind"], owner["name"]) == (self._primary["kind"], ours["name"]):
            message = f"waiting until the {what} of an earlier {owner['kind']} of this name is garbage-collected"
            raise Wait(Reason.WAITING_FOR_DELETION, message, _DELETION_SECONDS)
        whom = f"is controlled by {owner['kind']} {owner['name']!r}" if owner else "was not made by this operator"
        message = f"{what} is in the way: it {whom}. Delete or rename it, or use another name for this object."
        raise Terminal(Reason.FOREIGN_OWNER, message)


def _leaving(live: Object) -> bool:
    return "deletionTimestamp" in live["metadata"]
