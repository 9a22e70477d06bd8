"""A rollout on a real etcd and kube-apiserver: the operator and the gateway as they are shipped, as processes.

There are no controllers: whoever uses this says which endpoints a revision has. One fake policy answers as stable, the
other as every candidate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.harness.gateway import Pod, gateway, operator_token
from benchmarks.harness.operator import NAMESPACE, Bench, until
from rlhf_gateway.wire import ARM_HEADER, CONFIG_KEY, SERVE_PORT, GatewayConfig
from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds import policy_rollout
from rlhf_operator.kinds.base import CONFIG_MAP, ENDPOINT_SLICE, SERVICE
from rlhf_operator.kinds.policy_rollout.observe import SERVICE_NAME, gateway_name
from rlhf_operator.kube.api import path_of
from tests.unit.gateway_world import FakePolicy, serving

ROLLOUTS = primary_resource(policy_rollout.SPEC)
NAME, WEIGHT = "desk", 50.0
STABLE, CANARY = (f"sha256:{letter * 64}" for letter in "ab")
ADDRESSES = ("127.0.0.2", "127.0.0.3")
Dict = dict[str, Any]


@dataclass(frozen=True)
class Route:
    """What the operator wrote, and when our watch showed it (monotonic)."""

    at: float
    config: GatewayConfig

    @property
    def weight(self) -> float:
        return self.config.canary_weight_percent


@dataclass
class Rollout:
    """Half of the conversations go to the canary, as long as it has an endpoint."""

    bench: Bench
    client: aiohttp.ClientSession
    pod: Pod  # of the gateway
    stable: str  # revisions
    canary: str
    candidates: FakePolicy  # answers for all of them
    routes: asyncio.Queue[Route]

    @property
    def url(self) -> str:
        return self.pod.url

    async def endpoint(self, revision: str, ready: bool) -> float:
        """As the EndpointSlice controller says it; the moment of the API server's answer."""
        patch = {"endpoints": [_endpoint(ready)]}
        await self.bench.api.merge(ENDPOINT_SLICE, NAMESPACE, _slice_name(revision), patch)
        return time.monotonic()

    async def propose(self, digest: str) -> str:
        """The spec names another policy: its revision, once the operator has made its Service and knows an endpoint."""
        await self.bench.api.merge(ROLLOUTS, NAMESPACE, NAME, {"spec": {"policy": _policy(digest)}})
        return await _served(self.bench, digest)

    async def forget(self, revision: str) -> None:
        """Its endpoints go, as when its Service is deleted."""
        await self.bench.api.delete(ENDPOINT_SLICE, NAMESPACE, _slice_name(revision))

    async def status(self) -> Dict:
        live = await self.bench.api.get(ROLLOUTS, NAMESPACE, NAME) or {}
        return dict(live.get("status", {}))

    async def route(self, weight: float) -> Route:
        """The operator's next write of this weight."""
        while True:
            found = await self.routes.get()
            if found.weight == weight:
                return found

    async def weight(self, wanted: float) -> float:
        """When our watch showed the operator's write of this weight."""
        return (await self.route(wanted)).at

    async def first_by(self, arm: str, talk: str) -> float:
        """When a conversation, asking in a closed loop, first has an answer of this arm."""
        while await ask(self.client, self.url, talk) != arm:
            pass
        return time.monotonic()


async def ask(client: aiohttp.ClientSession, url: str, talk: str) -> str:
    """Who answers."""
    body = {"model": "desk", "prompt": "hello"}
    async with client.post(f"{url}/v1/completions", json=body, headers={"X-Conversation-Id": talk}) as response:
        await response.read()
        return response.headers.get(ARM_HEADER, "none")


def _endpoint(ready: bool) -> Dict:
    return {"addresses": ["10.0.0.1"], "conditions": {"ready": ready, "serving": ready}}


@contextlib.asynccontextmanager
async def rollout(bench: Bench, policy_seconds: float) -> AsyncIterator[Rollout]:
    """With the canary in its first stage, and the gateway sending to both."""
    bench.operator.start(operator_token(bench.plane))
    await until(bench.leads)
    await bench.api.create(ROLLOUTS, _manifest())
    stable = await _served(bench, STABLE)
    await bench.api.merge(ROLLOUTS, NAMESPACE, NAME, {"spec": {"policy": _policy(CANARY)}})
    canary = await _served(bench, CANARY)
    policies = [FakePolicy(name, delay=policy_seconds) for name in ("stable", "canary")]
    async with contextlib.AsyncExitStack() as stack:
        for policy, address in zip(policies, ADDRESSES, strict=True):
            await stack.enter_async_context(serving(policy.application(), SERVE_PORT, address))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        hosts = {f"{stable}.{NAMESPACE}.svc": ADDRESSES[0], f".{NAMESPACE}.svc": ADDRESSES[1]}
        pod = await stack.enter_async_context(gateway(bench, NAME, hosts, client))
        made = Rollout(bench, client, pod, stable, canary, policies[1], asyncio.Queue())
        watching = asyncio.create_task(_watch_routes(made))
        try:
            await made.weight(WEIGHT)
            yield made
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _policy(digest: str) -> Dict:
    return {"uri": f"pvc://models/{digest[7:17]}", "digest": digest}


def _manifest() -> Dict:
    stage = {"weightPercent": WEIGHT, "minSamples": 1_000_000}
    spec = {"policy": _policy(STABLE), "stages": [stage], "guardrails": [{"metric": "availability", "margin": 0.05}]}
    metadata = {"name": NAME, "namespace": NAMESPACE}
    return {"apiVersion": "rlhf.dev/v1alpha1", "kind": "PolicyRollout", "metadata": metadata, "spec": spec}


async def _served(bench: Bench, digest: str) -> str:
    """The revision of a policy, once the operator has made its Service, been told of an endpoint, and noted it."""

    async def entry() -> Dict:
        live = await bench.api.get(ROLLOUTS, NAMESPACE, NAME) or {}
        return next((r for r in live.get("status", {}).get("revisions", ()) if r["digest"] == digest), {})

    async def service() -> Dict | None:
        name = (await entry()).get("revision")
        return await bench.api.get(SERVICE, NAMESPACE, name) if name else None

    async def there() -> bool:
        return await service() is not None

    async def noted() -> bool:
        return "availableAt" in await entry()

    await until(there)
    found = await service()
    assert found is not None
    await bench.api.create(ENDPOINT_SLICE, _slice(found["metadata"]))
    await until(noted)
    return str(found["metadata"]["name"])


def _slice_name(revision: str) -> str:
    return f"{revision}-slice"


def _slice(service: Dict) -> Dict:
    """With the labels of its Service, as the EndpointSlice controller copies them."""
    labels = {**service["labels"], SERVICE_NAME: service["name"]}
    return {
        "apiVersion": ENDPOINT_SLICE.api_version,
        "kind": ENDPOINT_SLICE.kind,
        "metadata": {"name": _slice_name(service["name"]), "namespace": NAMESPACE, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [_endpoint(True)],
        "ports": [{"name": "http", "port": SERVE_PORT, "protocol": "TCP"}],
    }


async def _watch_routes(made: Rollout) -> None:
    bench, name = made.bench, gateway_name(NAME)
    url = f"{bench.api.server}{path_of(CONFIG_MAP, NAMESPACE)}"
    query = {"watch": "true", "fieldSelector": f"metadata.name={name}"}
    headers = await bench.api.authorization()
    timeout = aiohttp.ClientTimeout(total=None)
    async with bench.http.get(url, params=query, headers=headers, ssl=bench.api.tls, timeout=timeout) as stream:
        async for line in stream.content:
            now = time.monotonic()
            config = GatewayConfig.model_validate_json(json.loads(line)["object"]["data"][CONFIG_KEY])
            made.routes.put_nowait(Route(now, config))
