"""etcd and kube-apiserver alone, as envtest does it: a real API without nodes, for tests and benchmarks.

Needs no root, no namespaces and no container runtime. Several may run at once, each in its own folder.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from sandbox import audit, processes
from sandbox.api import ApiReader
from sandbox.binaries import Binaries
from sandbox.certificates import ADMIN, Authority, Subject
from sandbox.errors import SandboxError

START_SECONDS = 120.0
SERVICE_CIDR = "10.0.0.0/24"
_COMPONENTS = ("etcd", "kube-apiserver")  # in the order of their start
_ATTEMPTS = 3


@dataclass(frozen=True)
class _Instance:
    """What is written down of a running instance, so that another process can stop or use it."""

    mark: str
    server: str
    pids: dict[str, int]


class ControlPlane:
    """A running etcd and kube-apiserver on loopback.

        with ControlPlane(tmp_path, binaries, audit=True) as cp:
            cp.kubectl("apply", "-f", "crds/")
            alice = cp.user("alice", groups=["ml-engineers"])     # a kubeconfig
            cp.kubectl("get", "pods", user="alice", check=False)  # 403 until RBAC says otherwise

    - `kubeconfig` acts as an administrator (group system:masters); `server` is the URL.
    - Starting wipes what an earlier start left in the folder, except the certificates.
    - There is no controller manager: nothing deletes children of a deleted owner, namespaces stay in
      Terminating (use a new namespace per test), and pods need no ServiceAccount.
    - With `audit=True` every answered request is in `audit_log`; `requests()` reads it.
    - Both processes die with the thread that called `start`, unless `detached`.
    """

    def __init__(
        self,
        folder: Path,
        binaries: Binaries,
        *,
        audit: bool = False,
        detached: bool = False,
        apiserver_flags: Sequence[str] = (),
    ) -> None:
        self.folder = folder.absolute()
        self.kubeconfig = self.folder / "kubeconfig"
        self.audit_log = self.folder / "audit.jsonl"
        self._binaries = binaries
        self._audit = audit
        self._detached = detached
        self._extra_flags = tuple(apiserver_flags)
        self._instance: _Instance | None = _load(self.folder)
        self._users: dict[str, Path] = {}
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def server(self) -> str:
        if self._instance is None:
            raise SandboxError(f"the control plane in {self.folder} is not running")
        return self._instance.server

    @property
    def running(self) -> bool:
        instance = self._instance
        if instance is None or instance.pids.keys() != set(_COMPONENTS):
            return False  # or its start was interrupted between the two
        return all(processes.is_running(pid, instance.mark) for pid in instance.pids.values())

    @property
    def pids(self) -> dict[str, int]:
        return dict(self._instance.pids) if self._instance is not None else {}

    def start(self) -> None:
        """Starts, and returns when the API is ready. A running instance is left as it is."""
        if self.running:
            return
        self._binaries.prepare(_COMPONENTS)
        for attempt in range(1, _ATTEMPTS + 1):
            self.stop()
            try:
                self._start()
                return
            except SandboxError as error:
                # Between finding a free port and listening on it another process may take it.
                if attempt == _ATTEMPTS or "address already in use" not in str(error):
                    self.stop()
                    raise

    def stop(self) -> None:
        """Ends both processes; data, logs and certificates stay in the folder."""
        instance, self._instance = self._instance, None
        self._users.clear()
        if instance is not None:
            for name in reversed(_COMPONENTS):
                # Nothing is worth a graceful end here: the data are wiped at the next start.
                processes.end(instance.pids.get(name, 0), instance.mark, grace=0)
        while self._children:
            self._children.pop().wait()
        (self.folder / "instance.json").unlink(missing_ok=True)

    def user(self, name: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig that acts as user `name` in `groups` (besides system:authenticated)."""
        subject = Subject(name, groups=tuple(groups))
        file = f"user-{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([name, *groups])).hex[:12]}"
        path = self._authority.kubeconfig(file, subject, server=self.server)
        self._users[name] = path
        return path

    def kubectl(
        self, *args: str, user: str | None = None, input: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as administrator, or as `user` (see `user()`; one not made yet has no groups).

        With `check`, a failure raises SandboxError with kubectl's own words; else see `.returncode`,
        `.stdout` and `.stderr`. `input` is for `-f -`.
        """
        kubeconfig = self.kubeconfig if user is None else self._users.get(user) or self.user(user)
        command = [*self._binaries.command("kubectl"), f"--kubeconfig={kubeconfig}", *args]
        done = subprocess.run(command, input=input, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise SandboxError(f"kubectl {' '.join(args)} failed:\n{done.stderr.strip()}")
        return done

    def install_crds(self, *manifests: Path) -> None:
        """Applies files or folders of CustomResourceDefinitions and waits until they are established."""
        files = [word for path in manifests for word in ("-f", str(path))]
        self.kubectl("apply", "--server-side", "--force-conflicts", *files)
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", *files)

    def requests(self, *, since: datetime | None = None) -> Iterator[audit.Request]:
        """Answered requests from the audit log (needs `audit=True`), oldest first."""
        if not self.audit_log.exists():
            raise SandboxError(f"there is no audit log in {self.folder}: start it with audit=True")
        return audit.read(self.audit_log, since=since)

    @property
    def _reader(self) -> ApiReader:
        return ApiReader(self.server, self._authority, ADMIN)

    @property
    def _authority(self) -> Authority:
        return Authority.ensure(self.folder / "pki")

    def _start(self) -> None:
        for leftover in ("etcd", "logs"):
            shutil.rmtree(self.folder / leftover, ignore_errors=True)
        self.audit_log.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "audit-policy.json").write_text(audit.render_policy())
        etcd_port, api_port = free_ports(2)
        server = f"https://127.0.0.1:{api_port}"
        self._authority.kubeconfig("admin", ADMIN, server=server, to=self.kubeconfig)
        commands = {
            "etcd": etcd_flags(self.folder, etcd_port),
            "kube-apiserver": self._apiserver_flags(etcd_port, api_port),
        }
        mark, pids = uuid.uuid4().hex, {}
        for name in _COMPONENTS:
            words: list[str | Path] = [*self._binaries.command(name), *commands[name]]
            argv = words if self._detached else processes.tied_to_parent(words)
            child = processes.start(argv, mark=mark, log=self.log(name))
            self._children.append(child)
            pids[name] = child.pid
            # Written down at once: whoever comes after an interruption can end what runs.
            self._instance = _Instance(mark, server, dict(pids))
            _save(self.folder, self._instance)
        processes.wait_until(
            "kube-apiserver", self._reader.is_ready, seconds=START_SECONDS, hint=self._hint(), alive=self._died
        )

    def log(self, component: str) -> Path:
        return self.folder / "logs" / f"{component}.log"

    def _hint(self) -> str:
        return f"See {self.folder / 'logs'}."

    def _died(self) -> str | None:
        if self._instance is None:
            return "stopped"
        for name, pid in self._instance.pids.items():
            if not processes.is_running(pid, self._instance.mark):
                return f"{name} ended. The end of {self.log(name)}:\n{processes.tail(self.log(name))}"
        return None

    def _apiserver_flags(self, etcd_port: int, port: int) -> list[str]:
        authority = self._authority
        certificate, key = authority.issue("apiserver", Subject("kube-apiserver", hosts=("127.0.0.1", "localhost")))
        flags = [
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={port}",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            # A loopback address is no valid endpoint of the kubernetes Service, and nobody uses it.
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={authority.certificate}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={authority.service_account_certificate}",
            f"--service-account-signing-key-file={authority.service_account_key}",
            "--authorization-mode=RBAC",
            # Nobody creates the default ServiceAccounts here.
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged",
            "--profiling=false",
            f"--cert-dir={self.folder}",
        ]
        if self._audit:
            flags += audit.apiserver_flags(self.folder / "audit-policy.json", self.audit_log)
        return [*flags, *self._extra_flags]


def etcd_flags(folder: Path, port: int) -> list[str]:
    """A single etcd on loopback that does not wait for the disk: its data are for one run only."""
    client = f"http://127.0.0.1:{port}"
    return [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        "--listen-peer-urls=http://127.0.0.1:0",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _save(folder: Path, instance: _Instance) -> None:
    text = json.dumps({"mark": instance.mark, "server": instance.server, "pids": instance.pids})
    (folder / "instance.json").write_text(text)


def _load(folder: Path) -> _Instance | None:
    try:
        return _Instance(**json.loads((folder / "instance.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None  # none, or cut off in the middle of writing: the same as none
