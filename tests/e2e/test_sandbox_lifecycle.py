"""The sandbox comes up, stays up, can be broken and repaired, and leaves nothing when it goes.

These tests end the running sandbox and everything in it. They begin and end with `up`, so the tests that
run after them find a fresh one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.cgroups import MOUNT, NAME
from sandbox.cluster import Cluster
from sandbox.network import INTERFACE
from sandbox.paths import CHECKOUT
from sandbox.processes import wait_until

COMMAND = [sys.executable, "-m", "sandbox"]


def sandbox(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def succeed(*words: str) -> str:
    done = sandbox(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def traces(cluster: Cluster) -> list[str]:
    """What of a sandbox the system still knows, found by other means than the sandbox's own check."""
    found = []
    folder = str(cluster.places.cluster)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if folder in command or "containerd-shim" in command:
                found.append(f"process {command}")
    found += [f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines() if folder in line]
    for question in (["ip", "link"], ["ip", "route"]):
        shown = subprocess.run(question, capture_output=True, text=True, check=True).stdout
        found += [line for line in shown.splitlines() if INTERFACE in line or "10.97.0" in line]
    found += [f"control group {path}" for path in MOUNT.glob(f"**/{NAME}")]
    spaces = subprocess.run(["lsns", "--output=COMMAND"], capture_output=True, text=True, check=True).stdout
    found += [f"namespace {line}" for line in spaces.splitlines() if folder in line or line.startswith("/pause")]
    return found


@pytest.fixture
def cluster() -> Cluster:
    return Cluster.from_environment()


@pytest.fixture(scope="module", autouse=True)
def left_up() -> Iterator[None]:
    succeed("up")  # what is made once per machine is made here, outside of what is timed
    yield
    succeed("up")


def test_down_leaves_nothing_and_a_warm_up_is_ready_within_15_seconds(cluster: Cluster) -> None:
    cluster.kubectl("run", "leftover", "--image=python:3.11-slim-bookworm", "--", "sleep", "1000")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/leftover", "--timeout=180s")
    assert traces(cluster)

    succeed("down")
    assert traces(cluster) == []
    assert sandbox("status").returncode == 1

    started = time.monotonic()
    succeed("up")
    assert time.monotonic() - started < 15
    assert cluster.status().ready
    assert "leftover" not in cluster.kubectl("get", "pods", "--all-namespaces")


def test_a_second_up_does_nothing_within_2_seconds(cluster: Cluster) -> None:
    before = cluster.status().pids

    started = time.monotonic()
    succeed("up")

    assert time.monotonic() - started < 2
    assert cluster.status().pids == before


@pytest.mark.parametrize("at", ["etcd", "kube-apiserver", "kubelet"])
def test_an_up_killed_at_any_point_can_be_repeated(cluster: Cluster, at: str) -> None:
    succeed("down")
    killed = subprocess.Popen([*COMMAND, "up"], cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    wait_until(at, lambda: at in cluster.status().pids, seconds=60)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    succeed("up")

    assert cluster.status().ready
    cluster.kubectl("get", "serviceaccount", "default")


def test_components_that_died_are_started_by_up_and_the_rest_stays(cluster: Cluster) -> None:
    before = cluster.status().pids
    for name in ("kube-apiserver", "kube-scheduler"):
        os.kill(before[name], signal.SIGKILL)
    wait_until("their end", lambda: cluster.status().missing == ["kube-apiserver", "kube-scheduler"], seconds=10)
    assert sandbox("status").returncode == 1

    succeed("up")

    after = cluster.status().pids
    assert {name for name in before if after[name] != before[name]} == {"kube-apiserver", "kube-scheduler"}


def test_pods_outlive_a_restart_of_the_kubelet_and_of_containerd(cluster: Cluster) -> None:
    cluster.kubectl("run", "lasting", "--image=python:3.11-slim-bookworm", "--", "sleep", "1000")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/lasting", "--timeout=180s")
    container = _container_id(cluster, "lasting")
    before = cluster.status().pids

    for component in ("containerd", "kubelet"):
        succeed("restart", component)
        assert cluster.status().pids[component] != before[component]

    wait_until("the node", lambda: cluster.status().ready, seconds=60)
    wait_until("exec", lambda: "7" in cluster.kubectl("exec", "lasting", "--", "echo", "7"), seconds=60)
    assert _container_id(cluster, "lasting") == container


def _container_id(cluster: Cluster, pod: str) -> str:
    status = json.loads(cluster.kubectl("get", "pod", pod, "-o", "json"))["status"]
    return str(status["containerStatuses"][0]["containerID"])


def test_the_audit_log_can_be_switched_on_without_losing_anything(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "kept")

    succeed("up", "--audit")
    cluster.kubectl("annotate", "namespace", "kept", "seen=yes")
    succeed("restart", "kube-apiserver")  # it stays on

    wait_until("the API", lambda: cluster.status().ready, seconds=60)
    cluster.kubectl("annotate", "namespace", "kept", "seen=again", "--overwrite")
    lines = [json.loads(line) for line in cluster.places.audit_log.read_text().splitlines()]
    patches = [line for line in lines if line["verb"] == "patch" and line.get("objectRef", {}).get("name") == "kept"]
    assert [line["user"]["username"] for line in patches] == ["admin", "admin"]


def test_a_second_sandbox_is_refused_and_told_of_the_first(cluster: Cluster, tmp_path: Path) -> None:
    refused = sandbox("up", RLHF_SANDBOX_DIR=str(tmp_path))

    assert refused.returncode == 1
    assert f"Another sandbox runs, from {cluster.places.cluster}" in refused.stderr
    assert "make demo KUBECONFIG=" in refused.stderr


def test_logs_are_found_by_component_and_a_wrong_name_is_told_the_right_ones() -> None:
    assert "kubelet" in succeed("logs", "kubelet", "-n", "50")

    wrong = sandbox("logs", "dns")
    assert wrong.returncode == 1
    assert "coredns" in wrong.stderr
