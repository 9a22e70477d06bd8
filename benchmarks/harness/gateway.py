"""One pod of a rollout's gateway where there is no kubelet: the Pod object, and the shipped gateway as a process.

The pod says the loopback address on which the process listens at the ports of its image, so that the operator finds it
and reads it as in a cluster: with a token that the gateway has the API server review. The gateway reads its
configuration as its own ServiceAccount under the Role that the operator made for it. It is told the addresses of the
policies, which a cluster's DNS would tell it, and notes when it answered the operator's pulls of evidence;
`python -m benchmarks.harness.gateway` is that process.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from benchmarks.harness.operator import NAMESPACE, Bench, until
from rlhf_gateway import app as gateway_app
from rlhf_gateway.__main__ import run
from rlhf_gateway.admin import Admin
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings
from rlhf_gateway.wire import ADMIN_PORT, TOKEN_AUDIENCE, TRAFFIC_PORT, Evidence
from rlhf_operator.kinds.base import DEPLOYMENT, POD
from rlhf_operator.kinds.policy_rollout.observe import gateway_name
from sandbox.control_plane import ControlPlane

ADDRESS = "127.0.0.4"
OPERATOR_ACCOUNT = "rlhf-operator"
_TOKEN, _OPERATOR_TOKEN, _AUTHORITY, _PULLS = "gateway-token", "operator-token", "gateway-ca.crt", "pulls.jsonl"
Dict = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """One answer to the operator's pull of evidence, and when (monotonic) the gateway had it ready to send."""

    at: float
    evidence: Evidence


@dataclass(frozen=True)
class Pod:
    uid: str
    pulls: Path  # where the process notes its answers
    url: str = f"http://{ADDRESS}:{TRAFFIC_PORT}"

    def answered(self) -> list[Answered]:
        """The evidence that the operator was given so far, oldest first."""
        noted = [line.partition(" ") for line in self.pulls.read_text().splitlines()]
        return [Answered(float(at), Evidence.model_validate_json(text)) for at, _, text in noted]

    def forget(self) -> None:
        """The answers so far."""
        self.pulls.write_text("")


def operator_token(plane: ControlPlane) -> Path:
    """What the operator shows to gateways, and the permission to review it, which the chart gives to gateways."""
    plane.kubectl("--namespace", NAMESPACE, "create", "serviceaccount", OPERATOR_ACCOUNT)
    words = ("create", "token", OPERATOR_ACCOUNT, f"--audience={TOKEN_AUDIENCE}")
    path = plane.folder / _OPERATOR_TOKEN
    path.write_text(plane.kubectl("--namespace", NAMESPACE, *words).stdout)
    reviews = ("--verb=create", "--resource=tokenreviews.authentication.k8s.io")
    plane.kubectl("create", "clusterrole", "gateway", *reviews)
    whom = ("--clusterrole=gateway", f"--group=system:serviceaccounts:{NAMESPACE}")
    plane.kubectl("create", "clusterrolebinding", "gateway", *whom)
    return path


@contextlib.asynccontextmanager
async def gateway(
    bench: Bench, rollout: str, hosts: Mapping[str, str], client: aiohttp.ClientSession
) -> AsyncIterator[Pod]:
    """Ready, and known to the operator. `hosts`: addresses by host name, or by the end of one after a dot."""
    made = await _create_pod(bench, rollout)
    folder = bench.plane.folder
    _credentials(bench.plane, rollout, folder)
    pod = Pod(made["metadata"]["uid"], folder / _PULLS)
    pod.forget()
    told = {"server": bench.api.server, "folder": str(folder), "hosts": dict(hosts), "rollout": rollout, "uid": pod.uid}
    log = (folder / "gateway.log").open("wb")
    arguments = ("-m", "benchmarks.harness.gateway", json.dumps(told))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=log, stderr=log)

    async def ready() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.get(f"http://{ADDRESS}:{ADMIN_PORT}/readyz") as answer:
                return answer.status == 200
        if process.returncode is not None:
            raise RuntimeError(f"the gateway ended: {(folder / 'gateway.log').read_text()[-2000:]}")
        return False

    try:
        await until(ready, seconds=60)
        await _say_ready(bench, made)
        yield pod
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        log.close()


async def _create_pod(bench: Bench, rollout: str) -> Dict:
    """From the Deployment's template, as its controllers would."""
    name = gateway_name(rollout)
    deployment = await bench.api.get(DEPLOYMENT, NAMESPACE, name)
    assert deployment is not None
    template = deployment["spec"]["template"]
    metadata = {"name": f"{name}-0", "namespace": NAMESPACE, "labels": template["metadata"]["labels"]}
    body = {"apiVersion": POD.api_version, "kind": POD.kind, "metadata": metadata, "spec": template["spec"]}
    return await bench.api.create(POD, body)


async def _say_ready(bench: Bench, pod: Dict) -> None:
    """As the kubelet says it."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = {
        "phase": "Running",
        "podIP": ADDRESS,
        "podIPs": [{"ip": ADDRESS}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
    }
    metadata = pod["metadata"]
    await bench.api.patch_status(POD, NAMESPACE, metadata["name"], status, metadata["resourceVersion"])


def _credentials(plane: ControlPlane, rollout: str, folder: Path) -> None:
    """Token and certificate, as the kubelet projects them for the gateway's ServiceAccount."""
    token = plane.kubectl("--namespace", NAMESPACE, "create", "token", gateway_name(rollout)).stdout
    (folder / _TOKEN).write_text(token)
    cluster = yaml.safe_load(plane.kubeconfig.read_text())["clusters"][0]["cluster"]
    data = cluster.get("certificate-authority-data")
    found = base64.b64decode(data) if data else Path(cluster["certificate-authority"]).read_bytes()
    (folder / _AUTHORITY).write_bytes(found)


def _resolve(hosts: Mapping[str, str]) -> None:
    """Lets this process know the hosts."""
    resolve = socket.getaddrinfo

    def address(host: Any) -> Any:
        if not isinstance(host, str):
            return host
        return hosts.get(host) or hosts.get(f".{host.partition('.')[2]}", host)

    def known(host: Any, *arguments: Any, **named: Any) -> Any:
        return resolve(address(host), *arguments, **named)

    socket.getaddrinfo = known


def _note_pulls(path: Path) -> None:
    """Lets this process's admin port write down what evidence it answers, and when."""

    @web.middleware
    async def noting(request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.Response = await handler(request)
        if request.path == "/evidence" and answer.status == 200:
            at = time.monotonic()
            with path.open("a") as file:
                file.write(f"{at} {answer.text}\n")
        return answer

    class Noted(Admin):
        def application(self) -> web.Application:
            made = super().application()
            made.middlewares.append(noting)
            return made

    gateway_app.Admin = Noted  # type: ignore[attr-defined]


def main(told: Dict) -> None:
    """The gateway's process."""
    folder = Path(told["folder"])
    _resolve(told["hosts"])
    _note_pulls(folder / _PULLS)
    settings = Settings(
        rollout=told["rollout"], namespace=NAMESPACE, config_map=gateway_name(told["rollout"]),
        api=ApiServer(told["server"], folder / _TOKEN, folder / _AUTHORITY), pod_uid=told["uid"], host=ADDRESS,
        operator_username=f"system:serviceaccount:{NAMESPACE}:{OPERATOR_ACCOUNT}",
        drain_accept_seconds=0.0, drain_evidence_seconds=0.0,
    )  # fmt: skip
    asyncio.run(run(settings))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
