"""The gateway of one rollout: its workload, its permissions, and the configuration that is the split."""

from __future__ import annotations

from typing import Any

from rlhf_gateway.wire import (
    ADMIN_PORT,
    CONFIG_KEY,
    METRICS_PORT,
    TERMINATION_GRACE_SECONDS,
    TRAFFIC_PORT,
    Backend,
    ConversationKey,
    GatewayConfig,
    SafetyFilter,
)
from rlhf_operator.api.labels import COMPONENT
from rlhf_operator.api.policy_rollout import Stage
from rlhf_operator.api.policy_rollout_status import Revision
from rlhf_operator.kinds.base import CONFIG_MAP, DEPLOYMENT, ROLE, ROLE_BINDING, SERVICE, SERVICE_ACCOUNT, Resource
from rlhf_operator.kinds.policy_rollout.observe import GATEWAY, View, gateway_name
from rlhf_operator.kinds.policy_rollout.servers import (
    POD_SECURITY,
    RESTRICTED,
    backend,
    pod_labels,
    resources,
    selector,
)
from rlhf_operator.kinds.training.storage import IN_ROOT, Volume

TRIAL_STAGES = 100  # stage numbers of the gateway per trial: a second trial of a digest is counted afresh
HOLD = 99  # of them: traffic outside of any stage, which is no evidence
# Every user's answer passes here. Without a request for CPU the pod is BestEffort, and beside a training pod on a busy
# node it stands still for seconds: connections time out, and a failing readiness probe turns users away.
REQUESTS = {"cpu": "200m", "memory": "128Mi"}


def stage_number(trial: int, stage: int) -> int:
    """As the gateway counts: unique over the trials of a rollout."""
    return trial * TRIAL_STAGES + stage


def wished(
    view: View, trial: int, stable: Revision | None, candidate: Revision | None, stage: int | None
) -> GatewayConfig:
    """The configuration that says this split; `stage` None: the candidate gets nothing. Generation 0 is a blank."""
    spec = view.spec
    running: Stage | None = spec.stages[stage] if stage is not None and candidate is not None else None
    canary: Backend | None = backend(view, candidate) if candidate is not None and running is not None else None
    number = stage_number(trial, stage if stage is not None else HOLD)
    return GatewayConfig(
        generation=0,
        rollout=view.name,
        # Every stage draws anew. The tests multiply over stages: people who come back, on the arm they were on, would
        # bring the luck of one draw as evidence into each.
        salt=f"{view.uid}/{number}",
        stage=number,
        stable=backend(view, stable) if stable is not None else None,
        canary=canary,
        canary_weight_percent=running.weight_percent if running is not None else 0.0,
        shadow=running is not None and running.shadow,
        fallback_on_safety_hit=spec.fallback.on_safety_hit == "stable",
        conversation_key=ConversationKey(
            header=spec.routing.conversation_key.header, otherwise=spec.routing.conversation_key.otherwise
        ),
        safety_filter=_safety_filter(view),
        rollback_mode=spec.rollback.mode.value,
    )


def numbered(view: View, config: GatewayConfig) -> GatewayConfig:
    """The configuration with its generation: the live one if it says the same, else one that was never used."""
    live = view.live_config
    if live is not None and live.model_copy(update={"generation": 0}) == config:
        return live
    used = [view.status.generation, *(pod.state.generation for pod in view.gateway_pods if pod.state is not None)]
    return config.model_copy(update={"generation": max(0, live.generation if live is not None else 0, *used) + 1})


def children(view: View, config: GatewayConfig) -> tuple[dict[str, Any], ...]:
    """In the order in which they are needed; the split comes first, for a rollback must not wait for anything."""
    return (_config_map(view, config), *_permissions(view), _service(view), _deployment(view))


def _safety_filter(view: View) -> SafetyFilter | None:
    source = view.spec.safety_filter
    return SafetyFilter(path=Volume.parse(source.uri).at(IN_ROOT), digest=source.digest) if source is not None else None


def _object(view: View, resource: Resource, **fields: Any) -> dict[str, Any]:
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": gateway_name(view.name), "namespace": view.namespace, "labels": {COMPONENT: GATEWAY}},
        **fields,
    }


def _config_map(view: View, config: GatewayConfig) -> dict[str, Any]:
    return _object(view, CONFIG_MAP, data={CONFIG_KEY: config.to_json()})


def _permissions(view: View) -> tuple[dict[str, Any], ...]:
    """To read its own configuration and nothing else. Checking tokens is granted by the chart."""
    name = gateway_name(view.name)
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [name], "verbs": ["get", "list", "watch"]}
    return (
        _object(view, SERVICE_ACCOUNT),
        _object(view, ROLE, rules=[rule]),
        _object(
            view,
            ROLE_BINDING,
            roleRef={"apiGroup": ROLE.group, "kind": ROLE.kind, "name": name},
            subjects=[{"kind": "ServiceAccount", "name": name, "namespace": view.namespace}],
        ),
    )


def _service(view: View) -> dict[str, Any]:
    return _object(
        view,
        SERVICE,
        spec={
            "selector": selector(view, GATEWAY),
            "ports": [
                {"name": "http", "port": TRAFFIC_PORT, "targetPort": TRAFFIC_PORT, "protocol": "TCP"},
                {"name": "metrics", "port": METRICS_PORT, "targetPort": METRICS_PORT, "protocol": "TCP"},
            ],
        },
    )


def _deployment(view: View) -> dict[str, Any]:
    return _object(
        view,
        DEPLOYMENT,
        spec={
            "replicas": view.spec.routing.replicas,
            "selector": {"matchLabels": selector(view, GATEWAY)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": pod_labels(view, GATEWAY)}, "spec": _pod_spec(view)},
        },
    )


def _pod_spec(view: View) -> dict[str, Any]:
    settings = view.observed.settings
    env = {
        "ROLLOUT": view.name,
        "NAMESPACE": view.namespace,
        "CONFIGMAP": gateway_name(view.name),
        "OPERATOR_NAMESPACE": settings.operator_namespace,
        "OPERATOR_SERVICE_ACCOUNT": settings.operator_service_account,
    }
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    if view.spec.safety_filter is not None:
        claim = Volume.parse(view.spec.safety_filter.uri).claim
        volumes.append({"name": "safety", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "safety", "mountPath": f"{IN_ROOT}/{claim}", "readOnly": True})
    return {
        "serviceAccountName": gateway_name(view.name),
        "terminationGracePeriodSeconds": TERMINATION_GRACE_SECONDS,
        "securityContext": POD_SECURITY,
        "containers": [
            {
                "name": GATEWAY,
                "image": settings.gateway_image,
                "imagePullPolicy": settings.image_pull_policy,
                "command": ["python", "-m", "rlhf_gateway"],
                "env": [
                    *({"name": name, "value": value} for name, value in env.items()),
                    {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                ],
                "ports": [
                    {"name": "http", "containerPort": TRAFFIC_PORT, "protocol": "TCP"},
                    {"name": "admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
                ],
                "startupProbe": _probe("/healthz", period=1, failures=300),  # a busy node starts Python slowly
                "readinessProbe": _probe("/readyz", period=2, failures=3),
                "livenessProbe": _probe("/healthz", period=10, failures=6),
                "resources": resources(view.spec.routing.resources, REQUESTS),
                "securityContext": RESTRICTED,
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _probe(path: str, period: int, failures: int) -> dict[str, Any]:
    probe = {"httpGet": {"path": path, "port": ADMIN_PORT}, "periodSeconds": period, "timeoutSeconds": 5}
    return {**probe, "failureThreshold": failures}
