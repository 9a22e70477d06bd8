"""Whether a write is needed, decided without the API server. Pure.

A server-side apply that changes nothing still costs a round trip, and the audit log shows it. So an apply is skipped
when everything desired is already there (`is_subset`) and nothing was taken away since (the hash of the last applied
object, kept in an annotation: a subset check alone cannot see that a field is no longer wanted).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlhf_operator.api.labels import (
    DESIRED_HASH,
    FIELD_MANAGER,
    MANAGED_BY,
    OWNER_KIND,
    OWNER_NAME,
    OWNER_UID,
)
from rlhf_operator.kinds.base import Object

_QUANTITY = re.compile(r"^([+-]?[0-9.]+)([eE][+-]?[0-9]+|[numkKMGTPE]i?|)$")
_SUFFIX = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_QUANTITY_FIELDS = frozenset({"limits", "requests", "capacity", "hard", "sizeLimit", "divisor"})
_MERGE_KEYS = ("name", "type", "ip", "uid")


def adopt(child: Object, primary: Object) -> dict[str, Any]:
    """The child as it is sent: in the primary's namespace, labelled and controlled by it."""
    meta, owner = dict(child["metadata"]), primary["metadata"]
    meta.setdefault("namespace", owner.get("namespace", ""))
    meta["labels"] = {
        **(meta.get("labels") or {}),
        MANAGED_BY: FIELD_MANAGER,
        OWNER_KIND: primary["kind"],
        OWNER_NAME: owner["name"],
        OWNER_UID: owner["uid"],
    }
    meta["ownerReferences"] = [
        {
            "apiVersion": primary["apiVersion"],
            "kind": primary["kind"],
            "name": owner["name"],
            "uid": owner["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    return {**child, "metadata": meta}


def stamp(child: Object) -> dict[str, Any]:
    """With the hash of itself as an annotation."""
    canonical = json.dumps(child, sort_keys=True, separators=(",", ":"))
    meta = dict(child["metadata"])
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    meta["annotations"] = {**(meta.get("annotations") or {}), DESIRED_HASH: digest}
    return {**child, "metadata": meta}


def needs_apply(stamped: Object, live: Object | None) -> bool:
    return live is None or not is_subset(stamped, live)


def is_subset(desired: Any, live: Any, *, field: str = "") -> bool:
    """Whether everything in `desired` is in `live` already, as the API server would store it."""
    if live is None:
        return desired in ({}, [], "")  # the API server drops what is empty
    if isinstance(desired, Mapping):
        return isinstance(live, Mapping) and all(
            is_subset(value, live.get(key), field=field if field in _QUANTITY_FIELDS else key)
            for key, value in desired.items()
            if value is not None
        )
    if isinstance(desired, Sequence) and not isinstance(desired, str):
        return isinstance(live, Sequence) and not isinstance(live, str) and _list_subset(desired, live, field)
    if desired == live:
        return type(desired) is not bool or type(live) is bool
    if field in _QUANTITY_FIELDS:
        return quantity(desired) is not None and quantity(desired) == quantity(live)
    return False


def _list_subset(desired: Sequence[Any], live: Sequence[Any], field: str) -> bool:
    key = _merge_key(desired)
    if key is None:
        return len(desired) == len(live) and all(
            is_subset(d, v, field=field) for d, v in zip(desired, live, strict=True)
        )
    by_key = {item[key]: item for item in live if isinstance(item, Mapping) and key in item}
    return all(is_subset(item, by_key.get(item[key]), field=field) for item in desired)


def _merge_key(items: Sequence[Any]) -> str | None:
    """The key by which the API server merges lists like containers and env; None: the order counts."""
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    for key in _MERGE_KEYS:
        values = [item.get(key) for item in items]
        if None not in values and len(set(map(str, values))) == len(values):
            return key
    return None


def quantity(value: Any) -> Decimal | None:
    """The number that a Kubernetes quantity stands for: 0.5 == "500m", 1 == "1", "1Gi" == "1024Mi"."""
    match = _QUANTITY.match(str(value))
    if match is None:
        return None
    number, suffix = match.groups()
    try:
        if suffix in _BINARY:
            return Decimal(number) * Decimal(1024) ** _BINARY[suffix]
        if suffix in _SUFFIX:
            return Decimal(number).scaleb(_SUFFIX[suffix])
        return Decimal(number + suffix)
    except InvalidOperation:
        return None


def merge_patch(live: Mapping[str, Any], desired: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that turns `live` into `desired`; empty if they are equal."""
    patch: dict[str, Any] = {key: None for key in live if key not in desired}
    for key, value in desired.items():
        before = live.get(key)
        if key in live and _equal(before, value):
            continue
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            patch[key] = merge_patch(before, value)
        else:
            patch[key] = value
    return patch


def _equal(a: Any, b: Any) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1."""
    if a != b:
        return False
    # What Python calls equal may still differ in a bool; equal texts cannot, and are by far the quickest way to know.
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) or _same_truths(a, b)


def _same_truths(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping):
        return all(_same_truths(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return all(map(_same_truths, a, b))
    return True
