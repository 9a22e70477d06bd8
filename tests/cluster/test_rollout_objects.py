"""What a rollout's plan writes, on a real API server: accepted, and in place as it was asked for."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from rlhf_operator.engine.apply import adopt, is_subset
from sandbox.control_plane import ControlPlane
from tests.cluster.conftest import Kubectl
from tests.cluster.samples import CRDS
from tests.unit.rollout_world import B, World, source


@pytest.fixture(scope="module")
def crds(control_plane: ControlPlane) -> None:
    control_plane.install_crds(CRDS)


def world(namespace: str) -> World:
    made = World(
        serving={"resources": {"requests": {"cpu": "100m"}}, "podTemplate": {"spec": {"priorityClassName": "high"}}},
        routing={"replicas": 2},
    )
    made.primary["metadata"]["namespace"] = namespace
    return made


@pytest.mark.usefixtures("crds")
def test_children_are_stored_as_they_were_planned(kubectl: Kubectl, namespace: str) -> None:
    planned = world(namespace)
    planned.step()
    assert planned.plan is not None
    for child in planned.plan.apply:
        body = adopt(child, planned.primary)
        body["metadata"].pop("ownerReferences")  # the owner of this world exists in memory only
        kubectl("apply", "--server-side", "--field-manager=test", "-f", "-", input=json.dumps(body))
        live = json.loads(
            kubectl("-n", namespace, "get", child["kind"], child["metadata"]["name"], "-o", "json").stdout
        )
        assert is_subset(body, live), f"{child['kind']} would be applied for ever"


def status_of(kubectl: Kubectl, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
    """The status as it is stored, after the API server validated and pruned it."""
    patch = json.dumps({"status": body})
    kubectl("-n", namespace, "patch", "pr", "desk", "--subresource=status", "--type=merge", "-p", patch)
    stored: dict[str, Any] = json.loads(kubectl("-n", namespace, "get", "pr", "desk", "-o", "json").stdout)
    return dict(stored["status"])


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize("ends", ["trial", "promotion", "rollback"])
def test_the_status_is_stored_whole(kubectl: Kubectl, namespace: str, ends: str) -> None:
    """Nothing that the next pass relies on is pruned, and nothing is refused, whatever the rollout went through."""
    planned = world(namespace)
    body = {key: value for key, value in planned.primary.items() if key != "status"}
    body["metadata"] = {"name": "desk", "namespace": namespace}
    kubectl("create", "-f", "-", input=json.dumps(body))
    planned.serving()
    planned.spec(policy=source(B))
    planned.settle()
    if ends == "trial":
        planned.run(5)
        planned.now += timedelta(seconds=6)
        planned.settle()
        assert planned.status["evidence"]["comparisons"]
    else:
        harm = {"canary_bad": 0.5} if ends == "rollback" else {}
        planned.until("Healthy" if ends == "promotion" else "RolledBack", **harm)
    assert status_of(kubectl, namespace, planned.status) == planned.status
