"""Fixtures of the operator's tests on a real API server: `world` (users and the kubelet) and `operators`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.cluster.test_operator.world import Cluster, Operators, cluster, install


@pytest.fixture(scope="session")
def operator_kubeconfig(control_plane, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a user with the toy's generated role; the toy's CRD is served."""
    return install(control_plane, tmp_path_factory.mktemp("toy"))


@pytest.fixture
async def world(operator_kubeconfig: Path, kubeconfig: Path, namespace: str) -> AsyncIterator[Cluster]:
    assert operator_kubeconfig  # made: so is the CRD
    async with cluster(kubeconfig, namespace) as made:
        yield made


@pytest.fixture
async def operators(operator_kubeconfig: Path, namespace: str, tmp_path: Path) -> AsyncIterator[Operators]:
    async with aiohttp.ClientSession() as http:
        made = Operators(operator_kubeconfig, namespace, tmp_path, http)
        try:
            yield made
        finally:
            made.end()
