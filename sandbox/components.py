"""The daemons: their certificates and command lines, starting, finding and ending them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import audit, namespaces, network, processes
from sandbox.binaries import Binaries
from sandbox.certificates import ADMIN, ADMIN_GROUP, Authority, Subject
from sandbox.errors import SandboxError
from sandbox.namespaces import KUBELET_ROOT
from sandbox.network import NODE_IP, SERVER, SERVICE_CIDR
from sandbox.paths import Paths

NODE_NAME = "sandbox"
NAMES = (
    "etcd",
    "containerd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "buildkitd",
    "kubelet",
    "kube-proxy",
    "coredns",
)
BUILT = tuple(name for name in NAMES if name != "containerd")
_MARK = "sandbox-component:"
_GRACE_SECONDS = 5.0
_APISERVER_HOSTS = (
    NODE_IP,
    network.APISERVER_SERVICE_IP,
    "127.0.0.1",
    "localhost",
    NODE_NAME,
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{network.CLUSTER_DOMAIN}",
)
_SERVERS = {
    "apiserver": Subject("kube-apiserver", hosts=_APISERVER_HOSTS),
    "kubelet-server": Subject(NODE_NAME, hosts=(NODE_IP, NODE_NAME)),
}
_CLIENTS = {
    "apiserver-kubelet": Subject("apiserver-kubelet", groups=(ADMIN_GROUP,)),
    "kube-controller-manager": Subject("system:kube-controller-manager"),
    "kube-scheduler": Subject("system:kube-scheduler"),
    "kube-proxy": Subject("system:kube-proxy"),
    "coredns": Subject("coredns", groups=(ADMIN_GROUP,)),
    "kubelet": Subject(f"system:node:{NODE_NAME}", groups=("system:nodes",)),
}


def issue_certificates(places: Paths) -> None:
    """Certificates and kubeconfigs of all components and of the administrator; kept from one `up` to the next."""
    authority = Authority.ensure(places.pki)
    for name, subject in _SERVERS.items():
        authority.issue(name, subject)
    for name, subject in _CLIENTS.items():
        authority.kubeconfig(name, subject, server=SERVER)
    authority.kubeconfig("admin", ADMIN, server=SERVER, to=places.kubeconfig)


def arguments(name: str, places: Paths, *, audited: bool) -> list[str]:
    """The flags of one component."""
    pki, config = places.pki, places.config
    match name:
        case "etcd":
            return _etcd(places)
        case "containerd":
            return ["--config", f"{config / 'containerd.toml'}"]
        case "kube-apiserver":
            extra = audit.apiserver_flags(config / "audit-policy.json", places.audit_log) if audited else []
            return [*_apiserver(pki), *extra]
        case "kube-controller-manager":
            return [
                *_loopback_client(pki, name),
                f"--root-ca-file={pki / 'ca.crt'}",
                f"--service-account-private-key-file={pki / 'service-account.key'}",
                "--use-service-account-credentials",
                # Its controllers' credentials alone, asked for at the default rate, take 5 s.
                "--kube-api-qps=200",
                "--kube-api-burst=400",
                # A claim that is seen before its volume waits for this (15 s by default).
                "--pvclaimbinder-sync-period=1s",
                f"--cluster-signing-cert-file={pki / 'ca.crt'}",
                f"--cluster-signing-key-file={pki / 'ca.key'}",
            ]
        case "kube-scheduler":
            return _loopback_client(pki, name)
        case "kubelet":
            return [
                f"--config={config / 'kubelet.yaml'}",
                f"--kubeconfig={pki / 'kubelet.kubeconfig'}",
                f"--hostname-override={NODE_NAME}",
                f"--node-ip={NODE_IP}",
                f"--root-dir={KUBELET_ROOT}",
                "--v=2",
            ]
        case "kube-proxy":
            return [f"--config={config / 'kube-proxy.yaml'}", f"--hostname-override={NODE_NAME}"]
        case "coredns":
            return ["-conf", f"{config / 'Corefile'}"]
        case "buildkitd":
            return ["--config", f"{config / 'buildkitd.toml'}"]
    raise SandboxError(f"no component is called {name!r}; there are: {', '.join(NAMES)}")


def _etcd(places: Paths) -> list[str]:
    return [
        f"--data-dir={places.cluster / 'etcd'}",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",  # wiped at each `up`: nothing to lose by a power cut
        "--log-level=warn",
    ]


def _apiserver(pki: Path) -> list[str]:
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=0.0.0.0",
        f"--advertise-address={NODE_IP}",
        f"--secure-port={network.API_PORT}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--service-account-issuer=https://kubernetes.default.svc.{network.CLUSTER_DOMAIN}",
        f"--service-account-key-file={pki / 'service-account.crt'}",
        f"--service-account-signing-key-file={pki / 'service-account.key'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
    ]


def _loopback_client(pki: Path, name: str) -> list[str]:
    kubeconfig = pki / f"{name}.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]


@dataclass(frozen=True)
class Components:
    """The daemons of one running sandbox, whose first process is `init`."""

    places: Paths
    binaries: Binaries
    init: int
    audited: bool = False

    def start(self, *names: str) -> None:
        """Starts those of `names` that do not run."""
        running = self.running()
        for name in names:
            if name not in running:
                self._start(name)

    def restart(self, name: str) -> None:
        """Ends the component as an upgrade would, and starts it. Pods go on."""
        arguments(name, self.places, audited=self.audited)  # a wrong name ends here
        if (pid := self.running().get(name)) is not None:
            processes.end(pid, self._mark(name), grace=_GRACE_SECONDS)
        self._start(name)

    def running(self) -> dict[str, int]:
        """Pids, seen from the host, of the components that run."""
        found: dict[str, int] = {}
        for process in processes.scan(self._mark("")):
            name = process.mark.removeprefix(self._mark(""))
            # containerd's shims and nsenter carry the same mark; they are other programs.
            if _is_program(process.words, name):
                found.setdefault(name, process.pid)
        return found

    def why_ended(self, *names: str) -> str | None:
        """None while all of `names` run, else which ended and the end of its log."""
        running = self.running()
        for name in names:
            if name not in running:
                return f"{name} ended. The end of {self.log(name)}:\n{processes.tail(self.log(name))}"
        return None

    def log(self, name: str) -> Path:
        return self.places.logs / f"{name}.log"

    def _start(self, name: str) -> None:
        command = ["containerd"] if name == "containerd" else self.binaries.command(name)
        words = [*command, *arguments(name, self.places, audited=self.audited)]
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.environ.get("HOME", "/root"),
            # Layers are told apart by their overlay folders, not by comparing 5 GB of files.
            "BUILDKIT_DEBUG_FORCE_OVERLAY_DIFF": "false",
        }
        inside = namespaces.enter(self.init, words)
        wrapper = processes.start(inside, mark=self._mark(name), log=self.log(name), env=environment)

        def ended() -> str | None:
            return None if wrapper.poll() is None else f"it ended at once:\n{processes.tail(self.log(name))}"

        processes.wait_until(name, lambda: name in self.running(), seconds=10, alive=ended)

    def _mark(self, name: str) -> str:
        return f"{_MARK}{self.places.cluster}:{name}"


def _is_program(words: Sequence[str], name: str) -> bool:
    """Whether a command line is the program `name`, by itself or as `kube NAME`."""
    return name in (Path(words[0]).name if words else "", words[1] if len(words) > 1 else "")
