"""RBAC rules, derived from the table of kinds: what is not in the table cannot be touched.

No wildcards, no Secrets, no write to our own specs, no CRDs. docs/rbac.md says why for each role.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_operator.api.decision import PLURAL as DECISIONS
from rlhf_operator.api.decision import POLICY_NAME
from rlhf_operator.api.labels import GROUP
from rlhf_operator.kinds.base import KindSpec, Resource

Rule = dict[str, Any]

READ = ("get", "list", "watch")
OWN = (*READ, "create", "patch", "delete")
EDIT = ("create", "update", "patch", "delete", "deletecollection")
LEASE = "rlhf-operator"


def operator_rules(kinds: Sequence[KindSpec]) -> list[Rule]:
    """What the operator does in every namespace it watches."""
    plurals = sorted(kind.plural for kind in kinds)
    written = {child for kind in kinds for child in kind.children}
    observed = {seen for kind in kinds for seen in (*kind.observed_only, *kind.related)} - written
    return [
        _rule(GROUP, [*plurals, DECISIONS], READ),
        _rule(GROUP, [f"{plural}/status" for plural in plurals], ("patch",)),
        # Where OwnerReferencesPermissionEnforcement is on, a controller reference needs this and nothing is written.
        _rule(GROUP, [f"{plural}/finalizers" for plural in plurals], ("update",)),
        *_by_group(written, OWN),
        *_by_group(observed, READ),
        _rule("events.k8s.io", ["events"], ("create", "patch")),
    ]


def operator_cluster_rules() -> list[Rule]:
    """What the operator reads outside of namespaces: whether Decisions are bound to their authors."""
    resources = ["validatingadmissionpolicies", "validatingadmissionpolicybindings"]
    return [{**_rule("admissionregistration.k8s.io", resources, READ), "resourceNames": [POLICY_NAME]}]


def lease_rules() -> list[Rule]:
    """Leader election, in the operator's own namespace. RBAC cannot name what is yet to be created."""
    return [
        _rule("coordination.k8s.io", ["leases"], ("create",)),
        {**_rule("coordination.k8s.io", ["leases"], ("get", "update")), "resourceNames": [LEASE]},
    ]


def gateway_rules() -> list[Rule]:
    """What every rollout's gateway may ask of the API server: whose token it was shown."""
    return [_rule("authentication.k8s.io", ["tokenreviews"], ("create",))]


def viewer_rules(kinds: Sequence[KindSpec]) -> list[Rule]:
    """Aggregated into the cluster's view role."""
    plurals = sorted(kind.plural for kind in kinds)
    return [_rule(GROUP, [*plurals, DECISIONS, *(f"{plural}/status" for plural in plurals)], READ)]


def editor_rules(kinds: Sequence[KindSpec]) -> list[Rule]:
    """Aggregated into edit and admin: the kinds, but no Decisions. Who runs jobs does not thereby approve them."""
    return [_rule(GROUP, sorted(kind.plural for kind in kinds), EDIT)]


def decision_maker_rules() -> list[Rule]:
    """Bound by hand to those who approve. Nobody gets to change or delete what was decided: it is the audit trail."""
    return [_rule(GROUP, [DECISIONS], (*READ, "create"))]


def _by_group(resources: Iterable[Resource], verbs: Sequence[str]) -> list[Rule]:
    groups: dict[str, list[str]] = defaultdict(list)
    for resource in resources:
        groups[resource.group].append(resource.plural)
    return [_rule(group, sorted(groups[group]), verbs) for group in sorted(groups)]


def _rule(group: str, resources: Sequence[str], verbs: Sequence[str]) -> Rule:
    return {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}
