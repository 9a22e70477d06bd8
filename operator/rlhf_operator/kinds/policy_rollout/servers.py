"""The policy servers: one Deployment and one Service per revision, whatever its role.

Roles exist in the gateway's configuration alone. So a promotion changes no selector, relabels no pod and loads no
model a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_gateway.wire import SERVE_PORT, Backend
from rlhf_operator.api.labels import (
    COMPONENT,
    FIELD_MANAGER,
    MANAGED_BY,
    OWNER_KIND,
    OWNER_NAME,
    OWNER_UID,
    REVISION,
)
from rlhf_operator.api.policy_rollout_status import Revision
from rlhf_operator.api.training import ResourceRequirements
from rlhf_operator.kinds.base import DEPLOYMENT, SERVICE
from rlhf_operator.kinds.policy_rollout.engines import GRACE_SECONDS, server
from rlhf_operator.kinds.policy_rollout.observe import POLICY_SERVER, View
from rlhf_operator.kinds.training.merge import merge
from rlhf_operator.kinds.training.resources import node_amounts, openmp_threads
from rlhf_operator.kinds.training.storage import IN_ROOT, Volume

STARTUP_SECONDS = 1800  # a large model loads for long; a crash is seen by itself
# Users wait for every answer. Without a request for CPU a pod is BestEffort, and beside a training pod on a busy node
# it stands still for seconds. How much memory a policy takes only its user knows.
REQUESTS = {"cpu": "200m"}
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def deployment(view: View, revision: Revision, replicas: int) -> dict[str, Any]:
    labels = pod_labels(view, POLICY_SERVER, revision.revision)
    template = {"metadata": {"labels": labels}, "spec": _pod_spec(view, revision)}
    return {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.kind,
        "metadata": {
            "name": revision.revision,
            "namespace": view.namespace,
            "labels": {COMPONENT: POLICY_SERVER, REVISION: revision.revision},
            "annotations": {"rlhf.dev/digest": revision.digest},
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": selector(view, POLICY_SERVER, revision.revision)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": _with_labels(merge(template, view.spec.serving.pod_template), labels),
        },
    }


def service(view: View, revision: Revision) -> dict[str, Any]:
    return {
        "apiVersion": SERVICE.api_version,
        "kind": SERVICE.kind,
        "metadata": {
            "name": revision.revision,
            "namespace": view.namespace,
            "labels": {COMPONENT: POLICY_SERVER, REVISION: revision.revision},
        },
        "spec": {
            "selector": selector(view, POLICY_SERVER, revision.revision),
            "ports": [{"name": "http", "port": SERVE_PORT, "targetPort": SERVE_PORT, "protocol": "TCP"}],
        },
    }


def backend(view: View, revision: Revision) -> Backend:
    host = f"{revision.revision}.{view.namespace}.svc"
    return Backend(revision=revision.revision, digest=revision.digest, url=f"http://{host}:{SERVE_PORT}")


def pod_labels(view: View, component: str, revision: str | None = None) -> dict[str, str]:
    """Of pods: by them the operator sees the pods of its children, which are not its own children."""
    labels = {
        MANAGED_BY: FIELD_MANAGER,
        OWNER_KIND: "PolicyRollout",
        OWNER_NAME: view.name,
        OWNER_UID: view.uid,
        COMPONENT: component,
    }
    return {**labels, REVISION: revision} if revision is not None else labels


def selector(view: View, component: str, revision: str | None = None) -> dict[str, str]:
    labels = {OWNER_NAME: view.name, COMPONENT: component}
    return {**labels, REVISION: revision} if revision is not None else labels


def resources(asked: ResourceRequirements, requests: Mapping[str, str]) -> dict[str, Any]:
    """What a user asks for, over default requests. A limit is its own request, which a default could exceed."""
    defaults = {name: amount for name, amount in requests.items() if name not in asked.limits}
    found = {"limits": dict(asked.limits), "requests": {**defaults, **asked.requests}}
    return {name: amounts for name, amounts in found.items() if amounts}


def _pod_spec(view: View, revision: Revision) -> dict[str, Any]:
    volume = Volume.parse(revision.uri)
    wanted = resources(view.spec.serving.resources, REQUESTS)
    mounts = [
        {"name": "model", "mountPath": f"{IN_ROOT}/{volume.claim}", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    engine = server(view, revision, volume.at(IN_ROOT), openmp_threads(node_amounts(wanted).get("cpu", 0.0)))
    container: dict[str, Any] = {
        **engine.container,
        "name": POLICY_SERVER,
        "imagePullPolicy": view.observed.settings.image_pull_policy,
        "ports": [{"name": "http", "containerPort": SERVE_PORT, "protocol": "TCP"}],
        "startupProbe": _probe(period=1, failures=STARTUP_SECONDS),
        "readinessProbe": _probe(period=1, failures=2),
        "livenessProbe": _probe(period=10, failures=6),
        "resources": wanted,
        "securityContext": RESTRICTED,
        "volumeMounts": [*mounts, *engine.mounts],
    }
    checks = [{**check, "securityContext": RESTRICTED, "volumeMounts": mounts} for check in engine.checks]
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": POD_SECURITY,
        **({"initContainers": checks} if checks else {}),
        "containers": [container],
        "volumes": [
            {"name": "model", "persistentVolumeClaim": {"claimName": volume.claim, "readOnly": True}},
            {"name": "tmp", "emptyDir": {}},
            *engine.volumes,
        ],
    }


def _probe(period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": SERVE_PORT},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _with_labels(template: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A podTemplate may add labels, but the ones by which pods are found stay."""
    return merge(dict(template), {"metadata": {"labels": labels}})  # type: ignore[no-any-return]  # JSON in, JSON out
