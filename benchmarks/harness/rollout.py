"""A rollout on a real etcd and kube-apiserver: the operator and the gateway as they are shipped, as processes.

There are no controllers: whoever uses this says which endpoints a revision has. The gateway reads its configuration as
its own ServiceAccount under the Role that the operator made for it. It is told the addresses of the policies, which a
cluster's DNS would tell it; `python -m benchmarks.harness.rollout` is that process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.harness.operator import NAMESPACE, Bench, until
from rlhf_gateway.__main__ import run
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings
from rlhf_gateway.wire import CONFIG_KEY, SERVE_PORT
from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds import policy_rollout
from rlhf_operator.kinds.base import CONFIG_MAP, ENDPOINT_SLICE, SERVICE
from rlhf_operator.kinds.policy_rollout.observe import SERVICE_NAME, gateway_name
from rlhf_operator.kube.api import path_of
from sandbox.control_plane import ControlPlane
from tests.unit.gateway_world import FakePolicy, serving

ROLLOUTS = primary_resource(policy_rollout.SPEC)
NAME, WEIGHT = "desk", 50.0
STABLE, CANARY = (f"sha256:{letter * 64}" for letter in "ab")
ADDRESSES = ("127.0.0.2", "127.0.0.3")
TRAFFIC, ADMIN, METRICS = 18000, 18001, 19090
_TOKEN, _AUTHORITY = "gateway-token", "gateway-ca.crt"
Dict = dict[str, Any]


@dataclass
class Rollout:
    """Half of the conversations go to the canary, as long as it has an endpoint."""

    bench: Bench
    client: aiohttp.ClientSession
    stable: str  # revisions
    canary: str
    weights: asyncio.Queue[tuple[float, float]]  # when our watch showed which weight
    url: str = f"http://127.0.0.1:{TRAFFIC}"

    async def endpoint(self, revision: str, ready: bool) -> float:
        """As the EndpointSlice controller says it; the moment of the API server's answer."""
        patch = {"endpoints": [_endpoint(ready)]}
        await self.bench.api.merge(ENDPOINT_SLICE, NAMESPACE, f"{revision}-slice", patch)
        return time.monotonic()

    async def weight(self, wanted: float) -> float:
        """When our watch showed the operator's write of this weight."""
        while True:
            at, weight = await self.weights.get()
            if weight == wanted:
                return at


def _endpoint(ready: bool) -> Dict:
    return {"addresses": ["10.0.0.1"], "conditions": {"ready": ready, "serving": ready}}


@contextlib.asynccontextmanager
async def rollout(bench: Bench, policy_seconds: float) -> AsyncIterator[Rollout]:
    """With the canary in its first stage, and the gateway sending to both."""
    bench.operator.start()
    await until(bench.leads)
    await bench.api.create(ROLLOUTS, _manifest())
    stable = await _served(bench, STABLE)
    await bench.api.merge(ROLLOUTS, NAMESPACE, NAME, {"spec": {"policy": _policy(CANARY)}})
    canary = await _served(bench, CANARY)
    policies = [FakePolicy(name, delay=policy_seconds) for name in (stable, canary)]
    async with contextlib.AsyncExitStack() as stack:
        for policy, address in zip(policies, ADDRESSES, strict=True):
            await stack.enter_async_context(serving(policy.application(), SERVE_PORT, address))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        hosts = {f"{n}.{NAMESPACE}.svc": a for n, a in zip((stable, canary), ADDRESSES, strict=True)}
        await stack.enter_async_context(_gateway(bench, hosts, client))
        made = Rollout(bench, client, stable, canary, asyncio.Queue())
        watching = asyncio.create_task(_watch_weights(made))
        try:
            await made.weight(WEIGHT)
            yield made
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _policy(digest: str) -> Dict:
    return {"uri": f"pvc://models/{digest[7:9]}", "digest": digest}


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


def _slice(service: Dict) -> Dict:
    """With the labels of its Service, as the EndpointSlice controller copies them."""
    labels = {**service["labels"], SERVICE_NAME: service["name"]}
    return {
        "apiVersion": ENDPOINT_SLICE.api_version,
        "kind": ENDPOINT_SLICE.kind,
        "metadata": {"name": f"{service['name']}-slice", "namespace": NAMESPACE, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [_endpoint(True)],
        "ports": [{"name": "http", "port": SERVE_PORT, "protocol": "TCP"}],
    }


def _credentials(plane: ControlPlane, folder: Path) -> None:
    """Token and certificate, as the kubelet projects them for the gateway's ServiceAccount."""
    token = plane.kubectl("--namespace", NAMESPACE, "create", "token", gateway_name(NAME)).stdout
    (folder / _TOKEN).write_text(token)
    cluster = yaml.safe_load(plane.kubeconfig.read_text())["clusters"][0]["cluster"]
    data = cluster.get("certificate-authority-data")
    found = base64.b64decode(data) if data else Path(cluster["certificate-authority"]).read_bytes()
    (folder / _AUTHORITY).write_bytes(found)


@contextlib.asynccontextmanager
async def _gateway(bench: Bench, hosts: Mapping[str, str], client: aiohttp.ClientSession) -> AsyncIterator[None]:
    folder = bench.plane.folder
    _credentials(bench.plane, folder)
    told = {"server": bench.api.server, "folder": str(folder), "hosts": dict(hosts)}
    log = (folder / "gateway.log").open("wb")
    arguments = ("-m", "benchmarks.harness.rollout", json.dumps(told))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=log, stderr=log)

    async def ready() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.get(f"http://127.0.0.1:{ADMIN}/readyz") as answer:
                return answer.status == 200
        if process.returncode is not None:
            raise RuntimeError(f"the gateway ended: {(folder / 'gateway.log').read_text()[-2000:]}")
        return False

    try:
        await until(ready, seconds=60)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        log.close()


async def _watch_weights(made: Rollout) -> None:
    bench, name = made.bench, gateway_name(NAME)
    url = f"{bench.api.server}{path_of(CONFIG_MAP, NAMESPACE)}"
    query = {"watch": "true", "fieldSelector": f"metadata.name={name}"}
    headers = await bench.api.authorization()
    timeout = aiohttp.ClientTimeout(total=None)
    async with bench.http.get(url, params=query, headers=headers, ssl=bench.api.tls, timeout=timeout) as stream:
        async for line in stream.content:
            now = time.monotonic()
            config = json.loads(json.loads(line)["object"]["data"][CONFIG_KEY])
            made.weights.put_nowait((now, float(config["canaryWeightPercent"])))


def main(told: Dict) -> None:
    """The gateway's process."""
    hosts, resolve = told["hosts"], socket.getaddrinfo

    def known(host: Any, *arguments: Any, **named: Any) -> Any:
        return resolve(hosts.get(host, host), *arguments, **named)

    socket.getaddrinfo = known
    folder = Path(told["folder"])
    api = ApiServer(told["server"], folder / _TOKEN, folder / _AUTHORITY)
    settings = Settings(
        rollout=NAME, namespace=NAMESPACE, config_map=gateway_name(NAME), api=api, host="127.0.0.1",
        traffic_port=TRAFFIC, admin_port=ADMIN, metrics_port=METRICS,
        drain_accept_seconds=0.0, drain_evidence_seconds=0.0,
    )  # fmt: skip
    asyncio.run(run(settings))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
