"""Runs the operator over the toy kind as a process of its own, and plays the kubelet, against a real API server."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from rlhf_operator.api.crd import custom_resource_definition
from rlhf_operator.api.labels import API_VERSION
from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds import rbac
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, KindSpec, Resource
from rlhf_operator.kube.api import Api
from rlhf_operator.obs.metrics import Metrics
from sandbox.audit import Request
from tests.property.toy import WIDGET

ROOT = Path(__file__).parents[3]
WIDGETS = primary_resource(WIDGET)
RBAC = "rbac.authorization.k8s.io/v1"
OPERATOR = "toy-operator"  # the user that the operator acts as, with the generated role and no other
Dict = dict[str, Any]


def install(control_plane: Any, folder: Path) -> Path:
    """What the toy needs: its CRD and its role, generated like those of the real kinds; returns a kubeconfig."""
    file = folder / "widgets.json"
    file.write_text(json.dumps(custom_resource_definition(WIDGET)))
    control_plane.install_crds(file, ROOT / "crds" / "rlhf.dev_decisions.yaml")
    return grant(control_plane, OPERATOR, (WIDGET,))


def grant(control_plane: Any, user: str, kinds: Sequence[KindSpec]) -> Path:
    """A user with the role that is generated for an operator of these kinds; returns its kubeconfig."""
    rules = [*rbac.operator_rules(kinds), *rbac.operator_cluster_rules(), *rbac.lease_rules()]
    role = {"apiVersion": RBAC, "kind": "ClusterRole", "metadata": {"name": user}, "rules": rules}
    control_plane.kubectl("apply", "-f", "-", input=json.dumps(role))
    binding = ("create", "clusterrolebinding", user, f"--clusterrole={user}", f"--user={user}")
    control_plane.kubectl(*binding, check=False)
    return control_plane.user(user)


@dataclass
class Replica:
    """One process of the operator, for one namespace."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    http: aiohttp.ClientSession = field(repr=False)

    async def status(self, path: str) -> int:
        try:
            async with self.http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                return answer.status
        except aiohttp.ClientError:
            return 0

    async def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of that name with those labels."""
        total = 0.0
        async with self.http.get(f"http://127.0.0.1:{self.port}/metrics") as answer:
            for line in (await answer.text()).splitlines():
                series, _, value = line.rpartition(" ")
                found, _, rest = series.partition("{")
                if found == name and all(f'{key}="{wanted}"' in rest for key, wanted in labels.items()):
                    total += float(value)
        return total

    async def is_leader(self) -> bool:
        try:
            return await self.metric("rlhf_operator_leader_election_master_status") == 1
        except aiohttp.ClientError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; `until` the process has ended."""
        self.process.terminate()

    def text(self) -> str:
        return self.log.read_text()

    @property
    def rss_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the process has no VmRSS")


class Operators:
    """Starts replicas and ends what is left of them."""

    def __init__(
        self,
        kubeconfig: Path,
        namespace: str,
        folder: Path,
        http: aiohttp.ClientSession,
        module: str = "tests.cluster.test_operator.toy_operator",
    ) -> None:
        self._module = module
        self._kubeconfig = kubeconfig
        self._namespace = namespace
        self._folder = folder
        self._http = http
        self.replicas: list[Replica] = []

    async def start(self, *, ready: bool = True, **overrides: Any) -> Replica:
        number = len(self.replicas)
        port = _free_port()
        config = {
            "trainerImage": "trainer:test",
            "gatewayImage": "gateway:test",
            "operatorNamespace": self._namespace,
            "namespaces": [self._namespace],
            "http": {"host": "127.0.0.1", "port": port},
            "log": {"format": "json"},
            **overrides,
        }
        file, log = self._folder / f"config-{number}.yaml", self._folder / f"operator-{number}.log"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", self._module]
        process = _spawn([*command, "--config", str(file), "--kubeconfig", str(self._kubeconfig)], log)
        replica = Replica(process, log, port, self._http)
        self.replicas.append(replica)
        if ready:
            await until(lambda: _answers(replica, "/readyz"), "the operator is ready", log=log)
        return replica

    def end(self) -> None:
        for replica in self.replicas:
            if replica.process.poll() is None:
                replica.kill()


class Cluster:
    """What users and the kubelet do, in one namespace, through the client that the operator uses as well."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace

    def widget(self, name: str, **spec: Any) -> Dict:
        meta = {"name": name, "namespace": self.namespace}
        return {"apiVersion": API_VERSION, "kind": "Widget", "metadata": meta, "spec": spec}

    async def create(self, names: list[str], **spec: Any) -> None:
        await asyncio.gather(*(self.api.create(WIDGETS, self.widget(name, **spec)) for name in names))

    async def widgets(self) -> dict[str, Dict]:
        return await self._by_name(WIDGETS)

    async def jobs(self) -> dict[str, Dict]:
        return await self._by_name(JOB)

    async def config_maps(self) -> dict[str, Dict]:
        found = await self._by_name(CONFIG_MAP)
        return {name: obj for name, obj in found.items() if obj["metadata"].get("ownerReferences")}

    async def phases(self) -> dict[str, str]:
        return {name: (o.get("status") or {}).get("phase", "") for name, o in (await self.widgets()).items()}

    async def all_in(self, phase: str, count: int) -> bool:
        phases = await self.phases()
        return len(phases) == count and set(phases.values()) == {phase}

    async def end_job(self, name: str, type: str) -> None:
        """What the Job controller writes when the Job ends."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        conditions = [{"type": type, "status": "True", "lastTransitionTime": now, "reason": "Test"}]
        # The API server accepts an end only after the interim condition and with consistent counts.
        interim = "SuccessCriteriaMet" if type == "Complete" else "FailureTarget"
        conditions.insert(0, {**conditions[0], "type": interim})
        status: Dict = {"startTime": now, "conditions": conditions}
        if type == "Complete":
            status |= {"completionTime": now, "succeeded": 1}
        else:
            status |= {"failed": 1}
        live = await self.api.get(JOB, self.namespace, name)
        assert live is not None
        await self.api.patch_status(JOB, self.namespace, name, status, live["metadata"]["resourceVersion"])

    async def _by_name(self, resource: Resource) -> dict[str, Dict]:
        listing = await self.api.list(resource, self.namespace)
        return {obj["metadata"]["name"]: obj for obj in listing.items}


@asynccontextmanager
async def cluster(kubeconfig: Path, namespace: str) -> AsyncIterator[Cluster]:
    api = await Api.connect(Metrics(), kubeconfig=kubeconfig, max_in_flight=16, user_agent="tests")
    try:
        yield Cluster(api, namespace)
    finally:
        await api.close()


def writes(requests: Iterable[Request], namespace: str, user: str = OPERATOR) -> list[Request]:
    """The operator's writes in a namespace, Leases excepted."""
    ours = (r for r in requests if (r.user, r.namespace) == (user, namespace))
    return [r for r in ours if r.is_write and r.resource != "leases"]


async def quiet(replica: Replica) -> None:
    """Until the operator has nothing to do."""

    async def idle() -> bool:
        busy = ("workqueue_depth", "active_workers", "events_queued")
        return sum([await replica.metric(f"rlhf_operator_{gauge}") for gauge in busy]) == 0

    for _ in range(3):  # a pass that wrote is followed by one that looks again
        await until(idle, "the queue is empty", log=replica.log)
        await asyncio.sleep(0.3)


async def until(
    condition: Callable[[], Awaitable[bool]],
    what: str,
    *,
    seconds: float = 60.0,
    every: float = 0.05,
    log: Path | None = None,
) -> float:
    """Waits for `condition`, looking `every` so many seconds; returns how long it took."""
    started = time.monotonic()
    while not await condition():
        if time.monotonic() - started > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}\n{_tail(log)}")
        await asyncio.sleep(every)
    return time.monotonic() - started


async def _answers(replica: Replica, path: str) -> bool:
    if replica.process.poll() is not None:
        raise AssertionError(f"the operator ended with {replica.process.returncode}:\n{_tail(replica.log)}")
    return await replica.status(path) == 200


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, stderr=out, stdout=out)


def _tail(log: Path | None) -> str:
    return log.read_text()[-3000:] if log else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
