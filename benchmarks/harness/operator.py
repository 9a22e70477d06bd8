"""The operator as it is shipped against a real etcd and kube-apiserver, and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import aiohttp
import yaml

from rlhf_operator import app
from rlhf_operator.__main__ import main as serve
from rlhf_operator.kinds.base import Resource
from rlhf_operator.kube.api import Api, path_of
from rlhf_operator.obs.metrics import Metrics
from sandbox import binaries, paths
from sandbox.audit import Request
from sandbox.control_plane import ControlPlane
from sandbox.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, OPERATOR = "bench", "bench-operator"


class Operator:
    """The operator as it is shipped, as a process under a user of its own."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._log = (folder / "operator.log").open("ab")
        self._config = folder / "operator.yaml"
        self.port = _free_port()
        config = {
            "trainerImage": "trainer",
            "gatewayImage": "gateway",
            "operatorNamespace": NAMESPACE,
            "http": {"host": "127.0.0.1", "port": self.port},
        }
        self._config.write_text(yaml.safe_dump(config))
        self._command = [sys.executable, "-m", "rlhf_operator", "--config", str(self._config)]
        self._command += ["--kubeconfig", str(kubeconfig)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, token: Path | None = None) -> None:
        """`token`: a file with what gateways are shown, which the kubelet would mount where the operator looks."""
        command = self._command
        if token is not None:
            command = [sys.executable, "-m", __name__, str(token), *command[command.index("--config") :]]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)

    @property
    def rss_mib(self) -> float:
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    @property
    def cpu_seconds(self) -> float:
        assert self._process is not None
        return cpu_seconds(self._process.pid)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, of the user and of the kernel for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Bench:
    plane: ControlPlane
    api: Api
    http: aiohttp.ClientSession
    operator: Operator

    async def metric(self, name: str, *labels: str) -> float:
        """Asked for alone: a whole scrape, with the facts of every job, would be most of what is measured."""
        total = 0.0
        url = f"http://127.0.0.1:{self.operator.port}/metrics"
        try:
            async with self.http.get(url, params={"name[]": f"rlhf_operator_{name}"}) as answer:
                text = await answer.text()
        except aiohttp.ClientError:
            return 0.0
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"rlhf_operator_{name}" and all(label in series for label in labels):
                total += float(value)
        return total

    def cpu_seconds(self) -> dict[str, float]:
        """Of everything that shares the cores, by name."""
        spent = {name: cpu_seconds(pid) for name, pid in self.plane.pids.items()}
        return {**spent, "operator": self.operator.cpu_seconds, "load": cpu_seconds(os.getpid())}

    async def count(self, resource: Resource) -> int:
        return len((await self.api.list_metadata(resource, NAMESPACE)).items)

    async def leads(self) -> bool:
        return await self.metric("leader_election_master_status") == 1

    async def busy(self) -> float:
        gauges = ("workqueue_depth", "active_workers", "events_queued")
        return sum([await self.metric(gauge) for gauge in gauges])

    async def until_idle(self, passes: float = 0.0) -> float:
        """When the operator has led for at least so many passes and has nothing to do: the moment it was first so."""
        while True:
            if await self.leads() and await self.metric("reconcile_total") >= passes:
                since = time.monotonic()
                calm = True
                for _ in range(4):
                    calm = calm and await self.busy() == 0
                    await asyncio.sleep(0.1)
                if calm:
                    return since
            await asyncio.sleep(0.1)

    def writes(self, since: datetime) -> list[Request]:
        seen = self.plane.requests(since=since)
        return [r for r in seen if r.user == OPERATOR and r.is_write and r.resource != "leases"]


async def until(condition: Callable[[], Awaitable[bool]], every: float = 0.05, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {condition.__qualname__}")
        await asyncio.sleep(every)


async def watch(bench: Bench, resource: Resource, seen: dict[str, float]) -> None:
    version = (await bench.api.list_metadata(resource, NAMESPACE)).resource_version
    url = f"{bench.api.server}{path_of(resource, NAMESPACE)}?watch=true&resourceVersion={version}"
    headers = await bench.api.authorization()
    timeout = aiohttp.ClientTimeout(total=None)
    async with bench.http.get(url, headers=headers, ssl=bench.api.tls, timeout=timeout) as stream:
        async for line in stream.content:
            now = time.monotonic()
            event = json.loads(line)
            if event["type"] == "ADDED":
                seen[event["object"]["metadata"]["name"]] = now


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    programs = binaries.from_environment(paths.from_environment(), Progress())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ControlPlane(folder, programs, audit=True) as plane:
            plane.install_crds(ROOT / "crds")
            plane.kubectl("create", "namespace", NAMESPACE)
            binding = ("create", "clusterrolebinding", OPERATOR, "--clusterrole=cluster-admin", f"--user={OPERATOR}")
            plane.kubectl(*binding)
            api = await Api.connect(Metrics(), kubeconfig=plane.kubeconfig, max_in_flight=16, user_agent="bench")
            operator = Operator(plane.user(OPERATOR), folder)
            async with aiohttp.ClientSession(read_bufsize=2**21) as http:
                try:
                    yield Bench(plane, api, http, operator)
                finally:
                    operator.stop()
                    await api.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(token: str, *arguments: str) -> int:
    """The operator's process, with its token for gateways in another place."""
    app.TOKEN_PATH = token  # type: ignore[attr-defined]
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
