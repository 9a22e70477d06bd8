"""The sandbox with the operator in it, as users install it; each test that asks gets a namespace of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from sandbox.cluster import Cluster
from sandbox.paths import CHECKOUT
from tests.e2e.jobs_world import Namespace
from tests.e2e.rollout_world import CLAIM, Rollout

OPERATOR_NAMESPACE = "rlhf-system"


@pytest.fixture(scope="session")
def cluster_with_operator() -> Cluster:
    """Up, with images of this checkout and the operator from our own charts. What is there already is kept."""
    cluster = Cluster.from_environment()
    cluster.up()
    cluster.load(["operator", "trainer"])
    helm = ("upgrade", "--install", "--namespace", OPERATOR_NAMESPACE, "--create-namespace", "--wait")
    cluster.helm(*helm, "rlhf-operator-crds", str(CHECKOUT / "helm/rlhf-operator-crds"))
    images = ("--set", "image.tag=dev", "--set", "trainerImage=docker.io/library/rlhf-trainer:dev")
    cluster.helm(*helm, "--timeout=3m", *images, "rlhf-operator", str(CHECKOUT / "helm/rlhf-operator"))
    deployment = ("--namespace", OPERATOR_NAMESPACE, "deployment/rlhf-operator")
    cluster.kubectl("rollout", "restart", *deployment)  # the tag stays when the image changes
    cluster.kubectl("rollout", "status", "--timeout=120s", *deployment)
    return cluster


@pytest.fixture
def jobs(cluster_with_operator: Cluster) -> Iterator[Namespace]:
    """A fresh namespace with a shared volume; gone with everything in it afterwards."""
    namespace = Namespace(cluster_with_operator, f"jobs-{uuid.uuid4().hex[:8]}")
    yield namespace
    namespace.delete()


@pytest.fixture
def rollout(cluster_with_operator: Cluster) -> Iterator[Rollout]:
    """A fresh namespace with a volume of policies; gone with everything in it afterwards."""
    name = f"rollout-{uuid.uuid4().hex[:8]}"
    yield Rollout(cluster_with_operator, name, cluster_with_operator.volume(f"{name}/{CLAIM}"))
    cluster_with_operator.kubectl("delete", "namespace", name, "--wait=false")
