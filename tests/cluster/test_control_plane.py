"""The control plane that the other tests of this folder stand on does what they rely on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox import binaries, paths
from sandbox.control_plane import ControlPlane
from sandbox.errors import SandboxError
from sandbox.progress import Progress

READ_PODS = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "Role",
    "metadata": {"name": "read-pods"},
    "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}],
}


def test_it_reports_the_pinned_version(kubectl) -> None:
    version = json.loads(kubectl("version", "-o", "json").stdout)

    assert version["serverVersion"]["gitVersion"] == f"v{binaries.KUBERNETES_VERSION}"


def test_rbac_tells_two_users_apart_by_group(control_plane, kubectl, namespace) -> None:
    control_plane.user("alice", groups=["readers"])
    control_plane.user("bob")
    kubectl("-n", namespace, "apply", "-f", "-", input=json.dumps(READ_PODS))
    kubectl("-n", namespace, "create", "rolebinding", "readers", "--role=read-pods", "--group=readers")

    kubectl("-n", namespace, "get", "pods", user="alice")
    refused = kubectl("-n", namespace, "get", "pods", user="bob", check=False)

    assert refused.returncode != 0
    assert 'User "bob" cannot list resource "pods"' in refused.stderr


def test_the_audit_log_counts_writes_by_user(control_plane, kubectl, namespace) -> None:
    since = datetime.now(UTC)

    kubectl("-n", namespace, "create", "configmap", "one")
    kubectl("-n", namespace, "get", "configmaps")
    kubectl("-n", namespace, "delete", "configmap", "one")

    mine = [request for request in control_plane.requests(since=since) if request.namespace == namespace]
    assert [request.verb for request in mine if request.is_write] == ["create", "delete"]
    assert {request.user for request in mine} == {"admin"}
    assert "list" in [request.verb for request in mine]


def test_a_failing_kubectl_is_an_error_with_its_own_words(kubectl) -> None:
    with pytest.raises(SandboxError, match='namespaces "no-such" not found'):
        kubectl("get", "namespace", "no-such")


def test_a_second_instance_runs_beside_it_and_ends_without_trace(control_plane, tmp_path: Path) -> None:
    programs = binaries.from_environment(paths.from_environment(), Progress())
    with ControlPlane(tmp_path / "second", programs) as second:
        second.kubectl("create", "namespace", "only-here")
        pids = list(second.pids.values())
        assert second.server != control_plane.server

        # Another object on the same folder, as another process would make, finds it running.
        assert ControlPlane(tmp_path / "second", programs).running

    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)
    assert control_plane.kubectl("get", "namespace", "only-here", check=False).returncode != 0
