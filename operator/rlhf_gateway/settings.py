"""The gateway's settings, from its environment. Every one is used, and refused when it makes no sense."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_gateway.kube import ApiServer
from rlhf_gateway.upstream import Limits
from rlhf_gateway.wire import ADMIN_PORT, METRICS_PORT, TRAFFIC_PORT


class SettingsError(ValueError):
    """The environment is incomplete or wrong; the message names the variable."""


@dataclass(frozen=True)
class Settings:
    """Where this gateway belongs, and its limits. Seconds throughout."""

    rollout: str
    namespace: str
    config_map: str
    api: ApiServer
    operator_username: str = "system:serviceaccount:rlhf-system:rlhf-operator"
    pod_uid: str = field(default_factory=socket.gethostname)
    host: str = "0.0.0.0"
    traffic_port: int = TRAFFIC_PORT
    admin_port: int = ADMIN_PORT
    metrics_port: int = METRICS_PORT
    limits: Limits = field(default_factory=Limits)
    shadow_limit: int = 64
    max_conversations: int = 200_000
    record_share: float = 0.0
    probe_seconds: float = 1.0
    # On SIGTERM: go on accepting while the endpoint is withdrawn, then finish what is in flight, then wait for a pull.
    drain_accept_seconds: float = 5.0
    drain_answer_seconds: float = 60.0
    drain_evidence_seconds: float = 20.0
    epoch: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """ROLLOUT, NAMESPACE, CONFIGMAP are required; the rest has defaults. Raises SettingsError."""
        account = (
            f"{env.get('OPERATOR_NAMESPACE', 'rlhf-system')}:{env.get('OPERATOR_SERVICE_ACCOUNT', 'rlhf-operator')}"
        )
        return cls(
            rollout=_required(env, "ROLLOUT"),
            namespace=_required(env, "NAMESPACE"),
            config_map=_required(env, "CONFIGMAP"),
            api=ApiServer.in_cluster(
                _required(env, "KUBERNETES_SERVICE_HOST"), env.get("KUBERNETES_SERVICE_PORT", "443")
            ),
            operator_username=f"system:serviceaccount:{account}",
            pod_uid=env.get("POD_UID") or socket.gethostname(),
            limits=Limits(total_seconds=_number(env, "ANSWER_TIMEOUT_SECONDS", 120.0, least=0.1)),
            shadow_limit=int(_number(env, "SHADOW_LIMIT", 64, least=1)),
            max_conversations=int(_number(env, "MAX_CONVERSATIONS", 200_000, least=1)),
            record_share=_number(env, "RECORD_SHARE", 0.0, most=1.0),
            drain_accept_seconds=_number(env, "DRAIN_ACCEPT_SECONDS", 5.0),
            drain_answer_seconds=_number(env, "DRAIN_ANSWER_SECONDS", 60.0),
            drain_evidence_seconds=_number(env, "DRAIN_EVIDENCE_SECONDS", 20.0),
        )


def _required(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise SettingsError(f"environment variable {name} is not set: the operator sets it on the gateway's Deployment")
    return value


def _number(env: Mapping[str, str], name: str, default: float, least: float = 0.0, most: float = float("inf")) -> float:
    try:
        value = float(env.get(name) or default)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise SettingsError(f"environment variable {name} is {env[name]!r}: use a number from {least:g} to {most:g}")
    return value
