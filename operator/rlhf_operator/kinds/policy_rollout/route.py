"""What the gateways really do: whether a configuration is in force, and who may be scaled down."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rlhf_gateway.wire import ADMIN_PORT, GatewayConfig
from rlhf_operator.api.labels import COMPONENT
from rlhf_operator.kinds.base import DEPLOYMENT, SERVICE, ChildRef, Pull, Resource
from rlhf_operator.kinds.policy_rollout.observe import POLICY_SERVER, View, evidence_key, state_key
from rlhf_operator.kinds.training.objects import label_of, name_of, uid_of

TRIAL_SECONDS = 1.0  # between pulls while something is at stake
REST_SECONDS = 10.0


def confirmed(view: View, config: GatewayConfig) -> bool:
    """Whether every gateway pod that takes traffic acts on this configuration."""
    ready = [pod for pod in view.gateway_pods if pod.ready]
    return (
        view.live_config == config
        and bool(ready)
        and all(pod.state is not None and pod.state.generation >= config.generation for pod in ready)
    )


def drained(view: View, config: GatewayConfig, revision: str) -> bool:
    """Whether a revision outside of this configuration can go: no gateway sends it anything, none waits for it."""
    routed = {backend.revision for backend in (config.stable, config.canary) if backend is not None}
    if revision in routed:
        return False
    if not view.gateway_pods:
        return view.live_config == config
    in_flight = sum(pod.state.in_flight.get(revision, 0) for pod in view.gateway_pods if pod.state is not None)
    return confirmed(view, config) and in_flight == 0


def leftovers(view: View, wanted: set[str]) -> set[str]:
    """Revisions whose workload is there although the ledger has no use for it."""
    there = (*view.children(DEPLOYMENT.kind), *view.children(SERVICE.kind))
    return {name_of(child) for child in there if label_of(child, COMPONENT) == POLICY_SERVER} - wanted


def removals(view: View, config: GatewayConfig, wanted: set[str]) -> Iterator[ChildRef]:
    """The workloads that nothing is routed to any more."""
    for name in sorted(leftovers(view, wanted)):
        if drained(view, config, name):
            yield from _refs(view, DEPLOYMENT, name)
            yield from _refs(view, SERVICE, name)


def _refs(view: View, resource: Resource, name: str) -> Iterator[ChildRef]:
    for child in view.children(resource.kind):
        if name_of(child) == name and label_of(child, COMPONENT) == POLICY_SERVER:
            yield ChildRef(resource, view.namespace, name, uid_of(child) or None)


def pulls(view: View, busy: bool) -> tuple[Pull, ...]:
    """State and evidence of every gateway pod; at rest only so often that a leaving pod finds a reader."""
    every = TRIAL_SECONDS if busy else REST_SECONDS
    return tuple(
        Pull(key(pod.uid), f"http://{_host(pod.ip)}:{ADMIN_PORT}/{path}", every, authenticated=True)
        for pod in view.gateway_pods
        if pod.ip
        for path, key in (("evidence", evidence_key), ("state", state_key))
    )


def blind_since(view: View, recorded: datetime | None) -> datetime | None:
    """Since when counts have been out of reach; None while all can be read."""
    pods = [pod for pod in view.gateway_pods if not pod.leaving]
    if pods and not any(pod.blind(view.now) for pod in pods):
        return None
    return recorded or view.now


def blind_check(view: View) -> float | None:
    """Seconds until a silent pod counts as blind."""
    moments = [pod.blind_at(view.now) for pod in view.gateway_pods if not pod.leaving]
    return min(((moment - view.now).total_seconds() for moment in moments if moment is not None), default=None)


def parting_check(view: View) -> float | None:
    """Seconds until a pod that was told to go, and does not answer, is not waited for any more."""
    ends = [pod.ends_at for pod in view.gateway_pods if pod.ends_at is not None and pod.ends_at > view.now]
    return min(((end - view.now).total_seconds() for end in ends), default=None)


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
