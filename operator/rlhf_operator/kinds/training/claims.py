"""Whether the PersistentVolumeClaims that a job names can be mounted by all of its pods.

A claim that one node alone can mount leaves the pods on every other node waiting for ever, and says so nowhere that a
user looks. So it is refused before anything is created. What a claim promises is in its spec, which never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_operator.kinds.base import PERSISTENT_VOLUME_CLAIM, Key, Object
from rlhf_operator.kinds.training.objects import dig, text
from rlhf_operator.kinds.training.storage import BadUri, Volume

SHARED, READABLE = "ReadWriteMany", "ReadOnlyMany"
_UNREAD = ("trainer", "podTemplate")  # pods, not places of data


@dataclass(frozen=True)
class Use:
    """A claim as one field of a job needs it."""

    field: str
    claim: str
    written: bool


def claims_named(primary: Object) -> frozenset[Key]:
    """The claims of all URIs in the spec, and of the inputs that were resolved."""
    namespace = text(primary, "metadata", "namespace")
    uris = (*_uris(dig(primary, "spec")), *_uris(dig(primary, "status", "inputs")))
    return frozenset(claim_key(namespace, claim) for uri in uris if (claim := claim_of(uri)))


def claim_of(uri: str) -> str | None:
    """The claim that a URI names; None for what is in no claim."""
    try:
        return Volume.parse(uri).claim
    except BadUri:
        return None


def claim_key(namespace: str, claim: str) -> Key:
    return Key(PERSISTENT_VOLUME_CLAIM.kind, namespace, claim)


def missing(uses: tuple[Use, ...], claims: Mapping[str, Object | None]) -> str:
    """Which claims are not there, and what follows; empty if all are."""
    fields: dict[str, list[str]] = {}
    for use in uses:
        if claims.get(use.claim) is None:
            fields.setdefault(use.claim, []).append(use.field)
    named = [f"{claim} (of {', '.join(sorted(fields[claim]))})" for claim in sorted(fields)]
    if not named:
        return ""
    what = "PersistentVolumeClaim" + ("s" if len(named) > 1 else "")
    return (
        f"{what} {', '.join(named)} not found in this namespace: no pod that mounts it could leave Pending, so none is "
        "created; the job starts once it exists"
    )


def unsuitable(uses: tuple[Use, ...], claims: Mapping[str, Object | None], nodes: int) -> str:
    """The first use that a claim's access modes do not allow, and the remedy; empty if all are allowed."""
    for use in sorted(uses, key=lambda use: (not use.written, use.field)):
        modes = _modes(claims.get(use.claim))
        if modes and (problem := _problem(use, modes, nodes)):
            return f"{use.field}: PersistentVolumeClaim {use.claim} offers {', '.join(modes)} only; {problem}"
    return ""


def _problem(use: Use, modes: tuple[str, ...], nodes: int) -> str:
    if use.written and set(modes) == {READABLE}:
        return f"a run writes its checkpoints there: name a claim with ReadWriteOnce, or {SHARED} for several nodes"
    if nodes < 2 or SHARED in modes or (not use.written and READABLE in modes):
        return ""
    needed = SHARED if use.written else f"{SHARED} or {READABLE}"
    return (
        f"the pods of spec.trainer.numNodes = {nodes} may be on {nodes} nodes, and one node alone can mount it: name a "
        f"claim with {needed}, or set numNodes to 1"
    )


def _modes(claim: Object | None) -> tuple[str, ...]:
    found = dig(claim, "spec", "accessModes")
    return tuple(mode for mode in found if isinstance(mode, str)) if isinstance(found, list | tuple) else ()


def _uris(value: Any) -> Iterator[str]:
    """Every `uri` at any depth: a field that is added to a kind is found without being listed here."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "uri" and isinstance(inner, str):
                yield inner
            elif name not in _UNREAD:
                yield from _uris(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _uris(inner)
