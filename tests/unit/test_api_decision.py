"""Decisions: what is in force, and when the policy that binds them to their authors is."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rlhf_operator.api.decision import admission_policy, admission_policy_binding, enforced, readable

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def approve(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "Decision",
        "metadata": {"name": name, "uid": "1"},
        "spec": {
            "subject": {"kind": "PolicyRollout", "name": "desk"},
            "action": "Approve",
            "digest": "sha256:" + "0" * 64,
            "stage": 2,
            "by": "alice",
            "reason": "looked at the transcripts",
            **spec,
        },
    }


def test_only_what_is_readable_and_not_expired_is_in_force() -> None:
    later, now = NOW + timedelta(seconds=1), NOW
    decisions = [
        approve("for-ever"),
        approve("still", expiresAt=later.isoformat()),
        approve("expired", expiresAt=now.isoformat()),
        approve("unknown-action", action="Bless"),
        {"metadata": {"name": "broken"}},
    ]

    found = readable(decisions, NOW)

    assert [decision.name for decision in found] == ["for-ever", "still"]
    assert (found[0].spec.stage, found[0].spec.by) == (2, "alice")


def test_the_shipped_policy_and_binding_are_enforced() -> None:
    assert enforced(admission_policy(), admission_policy_binding())


def test_without_one_of_them_nothing_is() -> None:
    assert not enforced(None, admission_policy_binding())
    assert not enforced(admission_policy(), None)


@pytest.mark.parametrize(
    ("where", "path", "value"),
    [
        ("policy", "failurePolicy", "Ignore"),
        ("policy", "matchConditions", [{"name": "never", "expression": "false"}]),
        ("policy", "validations", [{"expression": "true"}]),
        ("policy", "matchConstraints.namespaceSelector", {"matchLabels": {"a": "b"}}),
        ("policy", "matchConstraints.objectSelector", {"matchLabels": {"a": "b"}}),
        ("policy", "matchConstraints.excludeResourceRules", [{"resources": ["decisions"]}]),
        ("policy", "matchConstraints.resourceRules", []),
        ("policy", "matchConstraints.resourceRules.0.operations", ["UPDATE"]),
        ("policy", "matchConstraints.resourceRules.0.apiGroups", ["apps"]),
        ("policy", "matchConstraints.resourceRules.0.resourceNames", ["only-this"]),
        ("policy", "matchConstraints.resourceRules.0.scope", "Cluster"),
        ("binding", "policyName", "other"),
        ("binding", "validationActions", ["Audit"]),
        ("binding", "matchResources", {"namespaceSelector": {"matchLabels": {"a": "b"}}}),
        ("binding", "matchResources", {"resourceRules": [{"resources": ["pods"]}]}),
        ("binding", "paramRef", {"name": "no-such-thing", "parameterNotFoundAction": "Allow"}),
    ],
)
def test_every_way_to_blunt_them_is_noticed(where: str, path: str, value: Any) -> None:
    objects = {"policy": copy.deepcopy(admission_policy()), "binding": copy.deepcopy(admission_policy_binding())}
    node: Any = objects[where]["spec"]
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value

    assert not enforced(objects["policy"], objects["binding"])
