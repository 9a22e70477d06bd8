"""Fixtures of the operator's tests on a real API server: `world` (users and the kubelet) and `operators`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.cluster.test_operator.world import Cluster, Operators, cluster, install


@pytest.fixture(scope="session")
def toy_kind(control_plane, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy's CRD is served."""
    install(control_plane, tmp_path_factory.mktemp("toy-crds"))
    return "Widget"


@pytest.fixture
async def world(toy_kind: str, kubeconfig: Path, namespace: str) -> AsyncIterator[Cluster]:
    assert toy_kind
    async with cluster(kubeconfig, namespace) as made:
        yield made


@pytest.fixture
async def operators(world: Cluster, kubeconfig: Path, tmp_path: Path) -> AsyncIterator[Operators]:
    async with aiohttp.ClientSession() as http:
        made = Operators(kubeconfig, world.namespace, tmp_path, http)
        try:
            yield made
        finally:
            made.end()
