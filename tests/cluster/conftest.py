"""A real etcd and kube-apiserver for the tests of this folder, started once per session.

Fixtures:

- `control_plane` (session): a running `sandbox.control_plane.ControlPlane` with its audit log on.
  `.server`, `.kubeconfig` (administrator), `.user(name, groups)` → kubeconfig of that user,
  `.install_crds(path...)`, `.requests(since=...)` → answered requests (`.is_write`, `.user`, `.resource`, ...).
- `kubeconfig` (session): the administrator's kubeconfig, a Path.
- `kubectl` (session): `kubectl(*args, user=None, input=None, check=True)` → CompletedProcess; raises with kubectl's
  words on failure unless `check=False`. `user` is any name: RBAC decides what it may do.
- `namespace`: the name of a namespace made for one test. There is no controller manager, so namespaces are never
  removed and children of deleted owners stay: tests must not share one.

    def test_two_users(control_plane, kubectl, namespace):
        control_plane.user("alice", groups=["ml-engineers"])
        refused = kubectl("-n", namespace, "get", "pods", user="alice", check=False)
        assert "forbidden" in refused.stderr
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from sandbox import binaries, paths
from sandbox.control_plane import ControlPlane
from sandbox.progress import Progress


class Kubectl(Protocol):
    def __call__(
        self, *args: str, user: str | None = None, input: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    programs = binaries.from_environment(paths.from_environment(), Progress())
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), programs, audit=True) as running:
        yield running


@pytest.fixture(scope="session")
def kubeconfig(control_plane: ControlPlane) -> Path:
    return control_plane.kubeconfig


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    return control_plane.kubectl


@pytest.fixture
def namespace(kubectl: Kubectl) -> str:
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl("create", "namespace", name)
    return name
