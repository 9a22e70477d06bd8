"""The Kubernetes API in memory, as far as the engine can tell the difference.

resourceVersions and uids, status subresource, generations, optimistic concurrency, server-side apply for one field
manager (fields no longer applied are removed, an apply that changes nothing is no new version), deletion with and
without finalizers, a log of watch events, an audit of writes, and faults on demand: conflicts, answers that get lost
after the write was done, and a crash of the client after any write.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_operator.api.labels import GROUP
from rlhf_operator.kinds.base import Resource
from rlhf_operator.kube.errors import TIMEOUT, ApiError
from rlhf_operator.kube.interface import Listing

Dict = dict[str, Any]


class Crash(BaseException):
    """The operator's process dies here: nothing of it may catch this."""


class Ref(NamedTuple):
    plural: str
    namespace: str
    name: str


class WatchEvent(NamedTuple):
    resource: Resource
    type: str  # ADDED, MODIFIED, DELETED
    object: Dict


@dataclass(frozen=True)
class Write:
    verb: str
    plural: str
    name: str
    changed: bool


@dataclass
class Faults:
    crash_after: int | None = None  # writes
    conflicts: int = 0  # the next writes of a status are refused
    lost_answers: int = 0  # the next writes happen, and the client is told of a timeout


@dataclass
class MemoryApi:
    faults: Faults = field(default_factory=Faults)
    objects: dict[Ref, Dict] = field(default_factory=dict)
    resources: dict[str, Resource] = field(default_factory=dict)
    applied: dict[str, Dict] = field(default_factory=dict)  # by uid: what our manager last applied
    writes: list[Write] = field(default_factory=list)
    events: list[WatchEvent] = field(default_factory=list)
    version: int = 0

    # What the engine calls

    async def get(self, resource: Resource, namespace: str, name: str) -> Dict | None:
        found = self.objects.get(Ref(resource.plural, namespace, name))
        return copy.deepcopy(found)

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        items = [copy.deepcopy(o) for o in self.select(resource, namespace, labels, fields)]
        return Listing(items, str(self.version))

    async def list_metadata(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        found = self.select(resource, namespace, labels, fields)
        items = [{"metadata": copy.deepcopy(o["metadata"])} for o in found]
        return Listing(items, str(self.version))

    async def create(self, resource: Resource, body: Dict) -> Dict:
        meta = body["metadata"]
        if Ref(resource.plural, meta["namespace"], meta["name"]) in self.objects:
            raise ApiError(409, f"{meta['name']} already exists", reason="AlreadyExists")
        return self._done("create", resource, meta["name"], self.insert(resource, body), changed=True)

    async def replace(self, resource: Resource, body: Dict) -> Dict:
        live = self._live(resource, body["metadata"].get("namespace", ""), body["metadata"]["name"])
        if body["metadata"].get("resourceVersion") != live["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified", reason="Conflict")
        new = {**copy.deepcopy(body), "metadata": {**live["metadata"], **body["metadata"]}}
        return self._done("update", resource, body["metadata"]["name"], self.store(resource, new), changed=True)

    async def merge(self, resource: Resource, namespace: str, name: str, patch: Dict) -> Dict:
        live = self._live(resource, namespace, name)
        return self._done("patch", resource, name, self.store(resource, merged(live, patch)), changed=True)

    async def apply(self, resource: Resource, body: Dict) -> Dict:
        meta = body["metadata"]
        live = self.objects.get(Ref(resource.plural, meta["namespace"], meta["name"]))
        if live is None:
            made = self.insert(resource, body)
            self.applied[made["metadata"]["uid"]] = copy.deepcopy(body)
            return self._done("apply", resource, meta["name"], made, changed=True)
        before = self.applied.get(live["metadata"]["uid"], {})
        new = merged(removed(copy.deepcopy(live), before, body), body)
        self.applied[live["metadata"]["uid"]] = copy.deepcopy(body)
        changed = new != live
        return self._done("apply", resource, meta["name"], self.store(resource, new), changed=changed)

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, status: Dict, resource_version: str
    ) -> Dict:
        live = self._live(resource, namespace, name)
        if self.faults.conflicts:
            self.faults.conflicts -= 1
            raise ApiError(409, "the object has been modified", reason="Conflict")
        if live["metadata"]["resourceVersion"] != resource_version:
            raise ApiError(409, "the object has been modified", reason="Conflict")
        new = {**live, "status": merged(live.get("status") or {}, status)}
        return self._done("patch-status", resource, name, self.store(resource, new), changed=True)

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str | None = None) -> Dict | None:
        live = self.objects.get(Ref(resource.plural, namespace, name))
        if live is None or (uid is not None and live["metadata"]["uid"] != uid):
            return None
        left = self.remove(resource, namespace, name)
        self._done("delete", resource, name, live, changed=True)
        return copy.deepcopy(left)

    # What the world does to it

    def insert(self, resource: Resource, body: Dict) -> Dict:
        """A new object, as the server would store it."""
        self.resources[resource.plural] = resource
        self.version += 1
        made = copy.deepcopy(body)
        made["metadata"].update(
            uid=f"uid-{self.version}",
            resourceVersion=str(self.version),
            creationTimestamp=f"2026-01-01T00:{self.version // 60 % 60:02}:{self.version % 60:02}Z",
            generation=1,
        )
        if resource.group == GROUP:
            made.pop("status", None)
        self.objects[Ref(resource.plural, made["metadata"]["namespace"], made["metadata"]["name"])] = made
        self._tell(resource, "ADDED", made)
        return made

    def store(self, resource: Resource, new: Dict) -> Dict:
        """A new version of an object, unless nothing has changed."""
        ref = Ref(resource.plural, new["metadata"].get("namespace", ""), new["metadata"]["name"])
        live = self.objects[ref]
        if new == live:
            return live
        self.version += 1
        new = copy.deepcopy(new)
        new["metadata"]["resourceVersion"] = str(self.version)
        if new.get("spec") != live.get("spec"):
            new["metadata"]["generation"] = live["metadata"]["generation"] + 1
        self.objects[ref] = new
        self._tell(resource, "MODIFIED", new)
        return new

    def remove(self, resource: Resource, namespace: str, name: str) -> Dict | None:
        """Deletes, or marks as leaving what has a finalizer; returns what is left."""
        ref = Ref(resource.plural, namespace, name)
        live = self.objects[ref]
        if live["metadata"].get("finalizers"):
            leaving = {**live, "metadata": {**live["metadata"], "deletionTimestamp": "2026-01-01T01:00:00Z"}}
            return self.store(resource, leaving)
        self.version += 1
        del self.objects[ref]
        gone = copy.deepcopy(live)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._tell(resource, "DELETED", gone)
        return None

    def collect_garbage(self) -> None:
        """Removes children whose controller is gone, as the garbage collector does."""
        uids = {o["metadata"]["uid"] for o in self.objects.values()}
        for ref, obj in list(self.objects.items()):
            owners = obj["metadata"].get("ownerReferences") or []
            if owners and all(owner["uid"] not in uids for owner in owners):
                self.remove(self.resources[ref.plural], ref.namespace, ref.name)

    def select(
        self, resource: Resource, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> Iterator[Dict]:
        wanted = dict(part.split("=") for part in labels.split(",") if part)
        name = fields.removeprefix("metadata.name=") if fields else None
        for ref, obj in sorted(self.objects.items()):
            have = obj["metadata"].get("labels") or {}
            if (
                ref.plural == resource.plural
                and namespace in (None, ref.namespace)
                and name in (None, ref.name)
                and all(have.get(key) == value for key, value in wanted.items())
            ):
                yield obj

    def of(self, plural: str) -> list[Dict]:
        return [obj for ref, obj in sorted(self.objects.items()) if ref.plural == plural]

    def _live(self, resource: Resource, namespace: str, name: str) -> Dict:
        try:
            return self.objects[Ref(resource.plural, namespace, name)]
        except KeyError:
            raise ApiError(404, f"{resource.plural} {name!r} not found", reason="NotFound") from None

    def _done(self, verb: str, resource: Resource, name: str, answer: Dict, *, changed: bool) -> Dict:
        self.writes.append(Write(verb, resource.plural, name, changed))
        if self.faults.crash_after is not None and len(self.writes) >= self.faults.crash_after:
            self.faults.crash_after = None
            raise Crash
        if self.faults.lost_answers:
            self.faults.lost_answers -= 1
            raise ApiError(TIMEOUT, f"{verb} {resource.plural} {name}: no answer")
        return copy.deepcopy(answer)

    def _tell(self, resource: Resource, type: str, obj: Dict) -> None:
        self.events.append(WatchEvent(resource, type, copy.deepcopy(obj)))


def merged(live: Dict, patch: Dict) -> Dict:
    """RFC 7386."""
    new = dict(live)
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        elif isinstance(value, dict):
            new[key] = merged(live.get(key) if isinstance(live.get(key), dict) else {}, value)
        else:
            new[key] = copy.deepcopy(value)
    return new


def removed(live: Dict, before: Dict, now: Dict) -> Dict:
    """`live` without the fields that were applied before and are not any more."""
    for key, value in before.items():
        if key not in now:
            live.pop(key, None)
        elif isinstance(value, dict) and isinstance(now[key], dict) and isinstance(live.get(key), dict):
            live[key] = removed(live[key], value, now[key])
    return live
