"""What a plan sees of the cluster, in the rollout's own terms. Nothing here raises on anything the store may hold."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TypeVar

from pydantic import ValidationError

from rlhf_gateway.wire import CONFIG_KEY, DataPlaneState, Evidence, GatewayConfig
from rlhf_operator.api.labels import COMPONENT, REVISION
from rlhf_operator.api.policy_rollout import PolicyRollout, PolicyRolloutSpec
from rlhf_operator.api.policy_rollout_status import PolicyRolloutStatus
from rlhf_operator.kinds.base import DEPLOYMENT, ENDPOINT_SLICE, POD, Object, Observed, Pulled
from rlhf_operator.kinds.training.objects import (
    condition,
    deleting,
    integer,
    is_true,
    label_of,
    mapping,
    mappings,
    moment,
    name_of,
    text,
    uid_of,
)

_Wire = TypeVar("_Wire", Evidence, DataPlaneState)

POLICY_SERVER = "policy-server"
GATEWAY = "gateway"
SERVICE_NAME = "kubernetes.io/service-name"  # label of an EndpointSlice
CRASH_LOOP_RESTARTS = 3
BLIND_AFTER = timedelta(seconds=15)  # a pull that fails for less is a hiccup


@dataclass(frozen=True)
class GatewayPod:
    """One pod of the gateway, and what it last said."""

    uid: str
    name: str
    ip: str
    ready: bool
    leaving: bool
    ends_at: datetime | None  # of one that leaves: when its grace period is over
    ready_since: datetime | None
    evidence: Evidence | None
    state: DataPlaneState | None
    evidence_pull: Pulled | None

    def blind(self, now: datetime) -> bool:
        """Whether its counts have been out of reach for so long that it is not a hiccup."""
        pull = self.evidence_pull
        if pull is None:
            return self.ready_since is not None and now - self.ready_since >= BLIND_AFTER
        if pull.error is not None:
            return pull.failing_since is not None and now - pull.failing_since >= BLIND_AFTER
        return self.evidence is None  # it answers, but not with evidence

    def blind_at(self, now: datetime) -> datetime | None:
        """When it will count as blind, if nothing changes."""
        pull = self.evidence_pull
        since = self.ready_since if pull is None else pull.failing_since
        return since + BLIND_AFTER if since is not None and not self.blind(now) else None


@dataclass(frozen=True)
class View:
    """One observation, read once."""

    observed: Observed
    rollout: PolicyRollout
    status: PolicyRolloutStatus  # as last written

    @property
    def spec(self) -> PolicyRolloutSpec:
        return self.rollout.spec

    @property
    def now(self) -> datetime:
        """Whole seconds, as Kubernetes writes times."""
        return self.observed.now.replace(microsecond=0)

    @property
    def name(self) -> str:
        return name_of(self.observed.primary)

    @property
    def namespace(self) -> str:
        return text(self.observed.primary, "metadata", "namespace")

    @property
    def uid(self) -> str:
        return uid_of(self.observed.primary)

    @property
    def generation(self) -> int:
        return integer(self.observed.primary, "metadata", "generation") or 0

    def children(self, kind: str) -> tuple[Object, ...]:
        return self.observed.children.get(kind, ())

    @cached_property
    def gateway_pods(self) -> tuple[GatewayPod, ...]:
        """Those that run, terminating ones too: their last counts are still to be read."""
        pods = (pod for pod in self.children(POD.kind) if label_of(pod, COMPONENT) == GATEWAY)
        return tuple(self._gateway_pod(pod) for pod in pods if text(pod, "status", "phase") == "Running")

    def _gateway_pod(self, pod: Object) -> GatewayPod:
        uid = uid_of(pod)
        evidence_pull = self.observed.pulled.get(evidence_key(uid))
        state_pull = self.observed.pulled.get(state_key(uid))
        evidence = _parsed(Evidence, evidence_pull)
        state = _parsed(DataPlaneState, state_pull)
        ends_at = moment(pod, "metadata", "deletionTimestamp")
        if ends_at is not None and ends_at <= self.now and state_pull is not None and state_pull.error is not None:
            state = None  # on a lost node it stays there, perhaps for ever: what it last said is not what it does
        return GatewayPod(
            uid=uid,
            name=name_of(pod),
            ip=text(pod, "status", "podIP"),
            ready=is_true(pod, "Ready") and not deleting(pod),
            leaving=deleting(pod),
            ends_at=ends_at,
            ready_since=moment(condition(pod, "Ready"), "lastTransitionTime") if is_true(pod, "Ready") else None,
            evidence=evidence if evidence is not None and evidence.pod_uid == uid else None,
            state=state if state is not None and state.pod_uid == uid else None,
            evidence_pull=evidence_pull,
        )

    @cached_property
    def live_config(self) -> GatewayConfig | None:
        """What the gateways are told now."""
        for config_map in self.children("ConfigMap"):
            if name_of(config_map) == gateway_name(self.name):
                try:
                    return GatewayConfig.model_validate_json(text(config_map, "data", CONFIG_KEY))
                except ValidationError:
                    return None
        return None

    def ready_endpoints(self, revision: str) -> int:
        """Endpoints of a revision's Service that take traffic."""
        slices = (s for s in self.children(ENDPOINT_SLICE.kind) if label_of(s, SERVICE_NAME) == revision)
        return sum(
            _addresses(endpoint)
            for found in slices
            for endpoint in mappings(found, "endpoints")
            if mapping(endpoint, "conditions").get("ready") is not False
        )

    def crash_loop(self, revision: str) -> str | None:
        """Why a revision's pods cannot live, in words; None while they may."""
        for pod in self.children(POD.kind):
            if label_of(pod, REVISION) != revision or deleting(pod):  # one that goes is not ready, and not crashing
                continue
            # A server that cannot check its policy itself has that done before it, by an init container.
            kinds = ("initContainerStatuses", "containerStatuses")
            for status in (status for kind in kinds for status in mappings(pod, "status", kind)):
                restarts = integer(status, "restartCount") or 0
                looping = text(status, "state", "waiting", "reason") == "CrashLoopBackOff"
                if looping or (restarts >= CRASH_LOOP_RESTARTS and status.get("ready") is not True):
                    return f"pod {name_of(pod)} keeps crashing: {restarts} restarts{_last_end(status)}"
        return None

    def deployment(self, name: str) -> Object | None:
        return next((d for d in self.children(DEPLOYMENT.kind) if name_of(d) == name), None)


def evidence_key(pod_uid: str) -> str:
    return f"evidence/{pod_uid}"


def state_key(pod_uid: str) -> str:
    return f"state/{pod_uid}"


def gateway_name(rollout: str) -> str:
    """Of the gateway's Deployment, Service, ConfigMap and role: users of the policy talk to this Service."""
    return f"{rollout}-gateway"


def _last_end(status: Object) -> str:
    ended = mapping(status, "lastState", "terminated")
    reason, code = text(ended, "reason"), integer(ended, "exitCode")
    return f", last ended with {reason or 'no reason'} (exit code {code})" if ended else ""


def _parsed(model: type[_Wire], pulled: Pulled | None) -> _Wire | None:
    if pulled is None or pulled.body is None:
        return None
    try:
        return model.model_validate(pulled.body)
    except ValidationError:
        return None


def _addresses(endpoint: Object) -> int:
    """How many; an endpoint that names none is still one."""
    addresses = endpoint.get("addresses")
    return len(addresses) if isinstance(addresses, list) and addresses else 1
