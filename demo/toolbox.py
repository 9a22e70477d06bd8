"""One-shot Jobs with the trainer image beside the demo's volume: the same on the sandbox and on any other cluster.

The operator never opens data, and neither does the demo from outside: what must be written, judged or read is done by a
pod that mounts the claim.
"""

from __future__ import annotations

import json
from typing import Any

from demo.cluster import Cluster, CommandError, Object

CLAIM = "desk"
MOUNT = "/data"


def job(name: str, image: str, command: list[str], *, cpu: str = "500m") -> Object:
    """A Job that runs once, as the training pods do: non-root, read-only root, no token."""
    container: Object = {
        "name": "tool",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": {"cpu": cpu, "memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "data", "mountPath": MOUNT}, {"name": "tmp", "mountPath": "/tmp"}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    pod: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "rlhf-demo"}},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


def run(cluster: Cluster, name: str, image: str, command: list[str]) -> str:
    """Runs the tool to its end and returns what it printed; raises CommandError with its last lines if it failed."""
    cluster.kubectl("delete", "job", name, "--ignore-not-found", "--wait")
    cluster.apply(job(name, image, command))
    for live in cluster.watch("job", name):
        conditions = {c["type"] for c in live.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        if "Complete" in conditions:
            break
        if "Failed" in conditions:
            tail = cluster.kubectl("logs", f"job/{name}", "--tail=15", check=False)
            raise CommandError(f"job {name} failed:\n{tail}")
    return cluster.kubectl("logs", f"job/{name}", "--tail=-1")


def last_object(text: str) -> dict[str, Any]:
    """The JSON object a tool printed last; what it said around it (a pod's log mixes both streams) is passed over."""
    start = text.rfind("\n{") + 1
    parsed: dict[str, Any] = json.JSONDecoder().raw_decode(text[start:])[0]
    return parsed
