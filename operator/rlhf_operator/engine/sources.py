"""What is watched: derived from the table of kinds, used alike for priming, watching and listing again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rlhf_operator.api.decision import DECISION
from rlhf_operator.api.labels import FIELD_MANAGER, GROUP, MANAGED_BY, VERSION
from rlhf_operator.engine.gate import BINDING, FIELDS, POLICY
from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds.base import KindSpec, Resource

DECISIONS = Resource(GROUP, VERSION, DECISION.kind, DECISION.plural)


class Source(NamedTuple):
    resource: Resource
    labels: str = ""  # selectors of the server side
    fields: str = ""
    cluster_scoped: bool = False


def sources(kinds: Iterable[KindSpec]) -> tuple[Source, ...]:
    """Our kinds first: when children arrive, their owners are known."""
    specs = tuple(kinds)
    children = {r: None for spec in specs for r in (*spec.children, *spec.observed_only)}
    related = {r: None for spec in specs for r in spec.related}
    return (
        *(Source(primary_resource(spec)) for spec in specs),
        Source(DECISIONS),
        *(Source(resource) for resource in related),
        *(Source(resource, labels=f"{MANAGED_BY}={FIELD_MANAGER}") for resource in children),
    )


def gate_sources() -> tuple[Source, ...]:
    """The admission policy and its binding: one name each, so that the role can be as narrow."""
    return tuple(Source(resource, fields=FIELDS, cluster_scoped=True) for resource in (POLICY, BINDING))
