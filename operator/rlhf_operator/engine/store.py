"""What is known of the cluster: slim objects, and who must look again when one of them changes.

`put` is safe against reordering: answers to our own writes and watch events arrive on different connections, so an
older copy of an object never replaces a newer one, and what was deleted does not come back.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_operator.api.labels import OWNER_KIND, OWNER_NAME, OWNER_UID
from rlhf_operator.engine.slim import slim
from rlhf_operator.kinds.base import Key, KindSpec, Object

DECISION = "Decision"
_TOMBSTONES = 10_000
_NEWEST = 1 << 64

logger = logging.getLogger(__name__)


class Id(NamedTuple):
    """Names one object in the store."""

    kind: str
    namespace: str
    name: str


def id_of(obj: Object) -> Id:
    meta = obj["metadata"]
    return Id(obj["kind"], meta.get("namespace", ""), meta["name"])


def controller_of(obj: Object) -> Mapping[str, Any] | None:
    """The owner reference with controller=true."""
    for owner in obj["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            return dict(owner)
    return None


class Store:
    """For one event loop; nothing here blocks or fails on what the API server sends."""

    def __init__(self, kinds: Iterable[KindSpec]) -> None:
        self._kinds = {spec.kind: spec for spec in kinds}
        self._objects: dict[Id, dict[str, Any]] = {}
        self._by_uid: dict[str, Id] = {}
        self._by_owner_uid: defaultdict[str, set[Id]] = defaultdict(set)
        self._by_owner_name: defaultdict[Key, set[Id]] = defaultdict(set)
        self._by_subject: defaultdict[Key, set[Id]] = defaultdict(set)
        self._referrers: defaultdict[Key, set[Key]] = defaultdict(set)
        self._references: dict[Key, frozenset[Key]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()  # uid -> version at which it was seen to be gone

    # Writing

    def put(self, raw: Object) -> frozenset[Key]:
        """Takes a newer copy in; returns who must look again: nobody if nothing that is read has changed."""
        meta = raw["metadata"]
        ident, uid = id_of(raw), meta.get("uid", "")
        old = self._objects.get(ident)
        if _version(raw) < self._gone.get(uid, -1) or (old is not None and _is_older(raw, old)):
            return frozenset()
        new = slim(raw)
        if old is not None and old["metadata"].get("uid") != uid:
            woken = self.remove(old)
            old = None
        else:
            woken = frozenset()
        if old is not None and _same(old, new):
            old["metadata"]["resourceVersion"] = meta.get("resourceVersion", "")
            return woken
        if old is not None:
            woken |= self._unindex(ident, old)
        self._objects[ident] = new
        return woken | self._index(ident, new)

    def remove(self, gone: Object) -> frozenset[Key]:
        """Forgets an object as of the resourceVersion of `gone`; a namesake with another uid is left alone."""
        ident, uid = id_of(gone), gone["metadata"].get("uid", "")
        self._gone[uid] = _version(gone)
        self._gone.move_to_end(uid)
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        old = self._objects.get(ident)
        if old is None or old["metadata"].get("uid") != uid:
            return frozenset()
        del self._objects[ident]
        return self._unindex(ident, old)

    # Reading

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get(Id(kind, namespace, name))

    def primary(self, key: Key) -> Object | None:
        return self._objects.get(Id(*key))

    def children(self, key: Key) -> dict[str, tuple[Object, ...]]:
        """By kind, sorted by name; every kind that the KindSpec names is there, perhaps empty."""
        spec, primary = self._kinds[key.kind], self.primary(key)
        found: dict[str, list[Object]] = {r.kind: [] for r in (*spec.children, *spec.observed_only)}
        uid = primary["metadata"].get("uid", "") if primary else ""
        for ident in sorted(self._by_owner_uid.get(uid, set()) | self._by_owner_name.get(key, set())):
            obj = self._objects[ident]
            if ident.kind in found and _belongs(obj, uid):
                found[ident.kind].append(obj)
        return {kind: tuple(objects) for kind, objects in found.items()}

    def related(self, key: Key) -> dict[Key, Object | None]:
        """What the object refers to, and what of `KindSpec.related` those objects refer to in turn: the claim that an
        upstream job has written its artifact to."""
        kinds = {resource.kind for resource in self._kinds[key.kind].related}
        direct = self._references.get(key, frozenset())
        further = {far for near in direct for far in self._references.get(near, ()) if far.kind in kinds}
        return {other: self.primary(other) for other in sorted(direct | further)}

    def decisions(self, key: Key) -> tuple[Object, ...]:
        """Oldest first, by the server's creationTimestamp."""
        found = (self._objects[ident] for ident in self._by_subject.get(key, ()))
        return tuple(sorted(found, key=lambda d: (d["metadata"].get("creationTimestamp", ""), d["metadata"]["name"])))

    def all_keys(self) -> Iterator[Key]:
        """Every object of our kinds."""
        for ident in self._objects:
            if ident.kind in self._kinds:
                yield Key(*ident)

    def primaries(self) -> Iterator[Object]:
        for ident, obj in list(self._objects.items()):
            if ident.kind in self._kinds:
                yield obj

    def of_kind(self, kind: str) -> dict[Id, Object]:
        return {ident: obj for ident, obj in self._objects.items() if ident.kind == kind}

    def counts(self) -> dict[str, int]:
        counts: defaultdict[str, int] = defaultdict(int)
        for ident in self._objects:
            counts[ident.kind] += 1
        return dict(counts)

    # Indexes

    def _index(self, ident: Id, obj: Object) -> frozenset[Key]:
        self._by_uid[obj["metadata"].get("uid", "")] = ident
        if ident.kind in self._kinds:
            self._index_references(Key(*ident), obj)
        if owner := controller_of(obj):
            self._by_owner_uid[owner["uid"]].add(ident)
        if named := _named_owner(obj):
            self._by_owner_name[named].add(ident)
        if ident.kind == DECISION and (subject := _subject(obj)):
            self._by_subject[subject].add(ident)
        return self._interested(ident, obj)

    def _unindex(self, ident: Id, obj: Object) -> frozenset[Key]:
        interested = self._interested(ident, obj)
        self._by_uid.pop(obj["metadata"].get("uid", ""), None)
        if ident.kind in self._kinds:
            self._drop_references(Key(*ident))
        if owner := controller_of(obj):
            _discard(self._by_owner_uid, owner["uid"], ident)
        if named := _named_owner(obj):
            _discard(self._by_owner_name, named, ident)
        if ident.kind == DECISION and (subject := _subject(obj)):
            _discard(self._by_subject, subject, ident)
        return interested

    def _index_references(self, key: Key, primary: Object) -> None:
        self._drop_references(key)
        try:
            wanted = self._kinds[key.kind].references(primary)
        except Exception:  # a defect of one kind: the object must be known all the same, its plan will tell
            logger.exception("references() of %s failed on %s/%s", *key)
            wanted = frozenset()
        self._references[key] = wanted
        for other in wanted:
            self._referrers[other].add(key)

    def _drop_references(self, key: Key) -> None:
        for other in self._references.pop(key, frozenset()):
            _discard(self._referrers, other, key)

    def _referrers_of(self, near: frozenset[Key], kind: str) -> set[Key]:
        """Who looks through `near` at an object of a related kind; see `related`."""
        far = {key for other in near for key in self._referrers.get(other, ())}
        return {key for key in far if any(resource.kind == kind for resource in self._kinds[key.kind].related)}

    def _interested(self, ident: Id, obj: Object) -> frozenset[Key]:
        key = Key(*ident)
        interested = set(self._referrers.get(key, ()))
        if ident.kind in self._kinds:
            interested.add(key)
        else:
            interested |= self._referrers_of(frozenset(interested), ident.kind)
        owner = controller_of(obj)
        if owner and (parent := self._by_uid.get(owner["uid"])) and parent.kind in self._kinds:
            interested.add(Key(*parent))
        if (named := _named_owner(obj)) and named.kind in self._kinds:
            interested.add(named)
        if ident.kind == DECISION and (subject := _subject(obj)) and subject.kind in self._kinds:
            interested.add(subject)
        return frozenset(interested)


def _named_owner(obj: Object) -> Key | None:
    meta = obj["metadata"]
    labels: Mapping[str, str] = meta.get("labels") or {}
    if OWNER_KIND in labels and OWNER_NAME in labels:
        return Key(labels[OWNER_KIND], meta.get("namespace", ""), labels[OWNER_NAME])
    return None


def _belongs(obj: Object, uid: str) -> bool:
    """Children of a namesake that lived before carry another uid: they are the garbage collector's."""
    owner = controller_of(obj)
    if owner and owner["uid"] == uid:
        return True
    return bool((obj["metadata"].get("labels") or {}).get(OWNER_UID, uid) == uid)


def _subject(decision: Object) -> Key | None:
    subject: Mapping[str, Any] = (decision.get("spec") or {}).get("subject") or {}
    if "kind" in subject and "name" in subject:
        return Key(subject["kind"], decision["metadata"].get("namespace", ""), subject["name"])
    return None


def _is_older(new: Object, old: Object) -> bool:
    """Whether `new` was overtaken by `old`."""
    return bool(new["metadata"].get("uid") == old["metadata"].get("uid") and _version(new) < _version(old))


def _version(obj: Object) -> int:
    """Versions of one resource type are comparable integers (KEP-5504); one that is not counts as the newest."""
    raw = str(obj["metadata"].get("resourceVersion", ""))
    return int(raw) if raw.isdecimal() else _NEWEST


def _same(old: Object, new: Object) -> bool:
    """Whether nothing but the resourceVersion differs."""
    if {**old, "metadata": None} != {**new, "metadata": None}:
        return False
    ignored = {"resourceVersion": None}
    return bool({**old["metadata"], **ignored} == {**new["metadata"], **ignored})


def _discard(index: defaultdict[Any, set[Any]], key: Any, value: Any) -> None:
    index[key].discard(value)
    if not index[key]:
        del index[key]
