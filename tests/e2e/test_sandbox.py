"""What pods can rely on in the sandbox: names, Services, tokens and RBAC, volumes, limits, images."""

from __future__ import annotations

import json
import time
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox import binaries
from sandbox.cluster import Cluster
from sandbox.images import IMAGES
from sandbox.processes import run, wait_until

BASE = "python:3.11-slim-bookworm"
NOBODY = {"runAsUser": 65532, "runAsGroup": 65532, "runAsNonRoot": True}
LOCKED = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    cluster = Cluster.from_environment()
    cluster.up()
    return cluster


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    name = f"sandbox-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def pod(name: str, *command: str, image: str = BASE, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "securityContext": LOCKED,
        # Pods that ask for nothing get next to nothing beside training pods.
        "resources": {"requests": {"cpu": "50m"}},
        **spec.pop("container", {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "securityContext": NOBODY,
            "containers": [container],
            **spec,
        },
    }


def apply(cluster: Cluster, namespace: str, *objects: dict[str, Any]) -> None:
    content = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    cluster.kubectl("--namespace", namespace, "apply", "-f", "-", input=content)


def output(cluster: Cluster, namespace: str, name: str, *, seconds: float = 180) -> str:
    """The log of a pod that has ended well."""

    def ended() -> bool:
        shown = cluster.kubectl("--namespace", namespace, "get", "pod", name, "-o", "jsonpath={.status.phase}")
        return shown in ("Succeeded", "Failed")

    wait_until(f"the end of pod {name}", ended, seconds=seconds)
    log = cluster.kubectl("--namespace", namespace, "logs", name)
    phase = cluster.kubectl("--namespace", namespace, "get", "pod", name, "-o", "jsonpath={.status.phase}")
    assert phase == "Succeeded", log
    return log


def test_two_pods_share_a_volume_which_the_host_sees(cluster: Cluster, namespace: str) -> None:
    folder = cluster.volume(f"{namespace}/shared")
    (folder / "from-host").write_text("host")
    shared = {
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}],
        "container": {"volumeMounts": [{"name": "shared", "mountPath": "/data"}]},
    }
    write = "cp /data/from-host /data/from-first && echo written"
    read = "until test -s /data/from-first; do sleep 0.1; done; cat /data/from-first"

    apply(cluster, namespace, pod("second", "sh", "-c", read, **shared), pod("first", "sh", "-c", write, **shared))

    assert output(cluster, namespace, "second") == "host"
    assert (folder / "from-first").read_text() == "host"
    assert cluster.volume(f"{namespace}/shared") == folder  # asking again changes nothing


def test_a_volume_outlives_its_claim(cluster: Cluster, namespace: str) -> None:
    folder = cluster.volume(f"{namespace}/kept")
    (folder / "file").write_text("still here")
    cluster.kubectl("--namespace", namespace, "delete", "persistentvolumeclaim", "kept")
    cluster.kubectl("wait", "--for=jsonpath={.status.phase}=Released", "pv", f"{namespace}.kept", "--timeout=60s")
    assert cluster.volume(f"{namespace}/kept") == folder
    assert (folder / "file").read_text() == "still here"


def test_a_service_is_reached_by_name_from_a_pod_and_by_address_from_the_host(cluster: Cluster, namespace: str) -> None:
    server = pod("web", "python3", "-m", "http.server", "8000", "--directory", "/usr/share")
    server["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    apply(cluster, namespace, server, service)
    cluster.kubectl("--namespace", namespace, "wait", "--for=condition=Ready", "pod/web", "--timeout=180s")

    ask = f"import urllib.request; print(urllib.request.urlopen('http://web.{namespace}').status)"
    apply(cluster, namespace, pod("client", "python3", "-c", ask))
    address = cluster.kubectl("--namespace", namespace, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")

    assert output(cluster, namespace, "client").strip() == "200"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{address}", timeout=10) as answer:
        assert answer.status == 200


def test_a_pods_token_may_do_what_rbac_grants_and_nothing_else(cluster: Cluster, namespace: str) -> None:
    kubectl = ("--namespace", namespace)
    cluster.kubectl(*kubectl, "create", "serviceaccount", "reader")
    cluster.kubectl(*kubectl, "create", "role", "reader", "--verb=list", "--resource=configmaps")
    cluster.kubectl(
        *kubectl, "create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader"
    )
    ask = f"""
import ssl, urllib.error, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
context = ssl.create_default_context(cafile=f"{{folder}}/ca.crt")
for resource in ("configmaps", "secrets"):
    url = f"https://kubernetes.default.svc/api/v1/namespaces/{namespace}/{{resource}}"
    request = urllib.request.Request(url, headers={{"Authorization": "Bearer " + open(f"{{folder}}/token").read()}})
    try:
        print(resource, urllib.request.urlopen(request, context=context).status)
    except urllib.error.HTTPError as error:
        print(resource, error.code)
"""
    apply(cluster, namespace, pod("asks", "python3", "-c", ask, serviceAccountName="reader"))

    assert output(cluster, namespace, "asks").splitlines() == ["configmaps 200", "secrets 403"]


def test_a_pod_has_no_way_out_and_fails_at_once(cluster: Cluster, namespace: str) -> None:
    ask = """
import socket, time
started = time.monotonic()
try:
    socket.create_connection(("192.0.2.1", 80), timeout=30)
except OSError as error:
    print(type(error).__name__, time.monotonic() - started < 5)
"""
    apply(cluster, namespace, pod("outward", "python3", "-c", ask))

    assert output(cluster, namespace, "outward").split()[1] == "True"


def test_a_memory_limit_ends_a_container_as_oom_killed(cluster: Cluster, namespace: str) -> None:
    limits = {"container": {"resources": {"limits": {"memory": "32Mi"}}}}
    apply(cluster, namespace, pod("hungry", "python3", "-c", "x = b'x' * 10**9", **limits))
    reason = "jsonpath={.status.containerStatuses[0].state.terminated.reason}"

    def killed() -> bool:
        return cluster.kubectl("--namespace", namespace, "get", "pod", "hungry", "-o", reason) == "OOMKilled"

    wait_until("OOMKilled", killed, seconds=180)


def test_loading_unchanged_images_is_quick(cluster: Cluster) -> None:
    cluster.load()
    started = time.monotonic()

    cluster.load()

    assert time.monotonic() - started < 3


def test_the_operators_image_runs_locked_down_and_without_torch(cluster: Cluster, namespace: str) -> None:
    cluster.load(["operator"])
    look = """
import importlib.util, os
import kopf, kubernetes, rlhf_gateway, rlhf_operator
print(os.getuid(), importlib.util.find_spec("torch"))
"""
    apply(cluster, namespace, pod("operator", "python", "-c", look, image=IMAGES["operator"].reference))

    assert output(cluster, namespace, "operator").split() == ["65532", "None"]


def test_the_trainers_image_needs_no_compiler(cluster: Cluster, namespace: str) -> None:
    cluster.load(["trainer"])
    look = """
import shutil
import torch.distributed as dist
from rlhf_trainer.engine import Engine
print("engine", Engine.__name__, dist.is_gloo_available(), shutil.which("g++"))
"""
    writable = {
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "container": {"volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]},
    }
    apply(cluster, namespace, pod("trainer", "python", "-c", look, image=IMAGES["trainer"].reference, **writable))

    last = output(cluster, namespace, "trainer", seconds=300).splitlines()[-1]
    assert last == "engine Engine True None"


def test_prometheus_can_be_had() -> None:
    program = binaries.prometheus()

    assert "prometheus, version 2" in run([program, "--version"])
