"""The full sandbox: `up`, `down`, and what can be done with it while it runs."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox import (
    base_image,
    binaries,
    cgroups,
    components,
    config_files,
    debian,
    leftovers,
    locks,
    namespaces,
    network,
    paths,
    preflight,
    processes,
    volumes,
)
from sandbox.api import ApiReader
from sandbox.certificates import ADMIN, Authority
from sandbox.components import NODE_NAME, Components
from sandbox.errors import SandboxError
from sandbox.images import Images
from sandbox.progress import Progress

START_SECONDS = 120.0
LOCK = Path("/run/lock/rlhf-sandbox.lock")
# What belongs to one run; certificates, images and volumes stay.
_FRESH = ("etcd", "kubelet", "pod-logs", "logs")


@dataclass(frozen=True)
class Status:
    """`pids` of the components that run; `missing` names the others."""

    pids: dict[str, int]
    ready: bool

    @property
    def missing(self) -> list[str]:
        return [name for name in components.NAMES if name not in self.pids]


@dataclass(frozen=True)
class _Run:
    """What is written down of the present run. `complete`: an `up` came to its end."""

    init: int | None = None
    audit: bool = False
    complete: bool = False


@dataclass(frozen=True)
class Cluster:
    """A single-node Kubernetes on this machine.

        cluster = Cluster.from_environment()
        cluster.up()
        cluster.load(["operator"])
        cluster.kubectl("get", "nodes")

    Its state lies under `places.cluster`; all methods may be called from different processes.
    """

    places: paths.Paths
    binaries: binaries.Binaries
    progress: Progress

    @classmethod
    def from_environment(cls, progress: Progress | None = None, *, bin_dir: Path | None = None) -> Cluster:
        places, shown = paths.from_environment(), progress or Progress()
        return cls(places, binaries.from_environment(places, shown, bin_dir=bin_dir), shown)

    @property
    def kubeconfig(self) -> Path:
        return self.places.kubeconfig

    def up(self, *, audit: bool = False) -> None:
        """Starts the sandbox, or what is missing of it, and returns when pods can be started.

        Does nothing, quickly, when everything runs. What an interrupted `up` left is taken away first.
        """
        recorded = self._recorded()
        if recorded.complete and (recorded.audit or not audit) and self.status().ready:
            self.progress.say(f"the sandbox is up: KUBECONFIG={self.kubeconfig}")
            return
        with _machine_lock(self.progress):
            recorded = self._recorded()
            if not recorded.complete:
                self._clean_start(audit)
            elif audit and not recorded.audit:
                self._record(audit=True, complete=True)
                self._components(self.init).restart("kube-apiserver")
            self._start_components()
            self._record(audit=audit or recorded.audit, complete=True)
        self.progress.say(f"the sandbox is up: KUBECONFIG={self.kubeconfig}")

    def down(self) -> None:
        """Ends everything and verifies that nothing is left but files. Images and volumes stay on disk."""
        with _machine_lock(self.progress):
            self._down()
        self.progress.say("the sandbox is down")

    def status(self) -> Status:
        init = namespaces.find(self.places)
        if init is None:
            return Status({}, ready=False)
        pids = self._components(init).running()
        try:
            ready = len(pids) == len(components.NAMES) and self._reader.node_is_ready(NODE_NAME)
        except OSError:
            ready = False
        return Status(pids, ready)

    def restart(self, name: str) -> None:
        """Ends one component and starts it again. Pods go on."""
        with _machine_lock(self.progress):
            self._components(self.init).restart(name)
        self.progress.say(f"{name} is restarted")

    def load(self, names: Iterable[str] = ()) -> None:
        """Builds the repository's images into the sandbox, those that changed (see `Images.load`)."""
        self._images(self.init).load(names)

    def volume(self, name: str) -> Path:
        """A volume `NAMESPACE/NAME` with a claim bound to it, for any number of pods; returns its host folder."""
        namespace, claim = volumes.parse(name)
        folder = volumes.host_folder(self.places.volumes, namespace, claim)
        volumes.make_folder(folder)
        # A volume that remembers a deleted claim binds no other; what is in its folder stays.
        known = volumes.volume_name(namespace, claim)
        if self.kubectl("get", "pv", known, "--ignore-not-found", "-o", "jsonpath={.status.phase}") == "Released":
            self.kubectl("delete", "pv", known)
        self.kubectl("apply", "-f", "-", input=volumes.manifest(namespace, claim, folder))
        bound = "--for=jsonpath={.status.phase}=Bound"
        # As long as a controller manager that was restarted waits for the lease of its predecessor, and then some.
        self.kubectl("--namespace", namespace, "wait", bound, "--timeout=90s", f"persistentvolumeclaim/{claim}")
        return folder

    def kubectl(self, *args: str, input: str | None = None) -> str:
        """Runs kubectl as administrator and returns what it printed. Raises SandboxError with its words."""
        return processes.run(self.kubectl_command(*args), input=input)

    def kubectl_command(self, *args: str) -> list[str]:
        return [*self.binaries.command("kubectl"), f"--kubeconfig={self.kubeconfig}", *args]

    def helm(self, *args: str) -> str:
        """Runs Helm as administrator and returns what it printed. Raises SandboxError with its words."""
        return processes.run(self.helm_command(*args))

    def helm_command(self, *args: str) -> list[str]:
        return [*self.binaries.command("helm"), f"--kubeconfig={self.kubeconfig}", *args]

    def enter_command(self, *args: str) -> list[str]:
        """The command line that runs a program inside the sandbox's namespaces."""
        return namespaces.enter(self.init, args)

    @property
    def init(self) -> int:
        """The first process of the sandbox. Raises SandboxError when it is not up."""
        init = namespaces.find(self.places)
        if init is None:
            raise SandboxError("the sandbox is not up: start it with `python -m sandbox up`")
        return init

    def _clean_start(self, audit: bool) -> None:
        """From whatever an interrupted run left to namespaces, network and control groups."""
        if namespaces.find(self.places) is not None:
            self._down()
        preflight.check(self.places)
        self._prepare()
        self._make_room(audit)

    def _prepare(self) -> None:
        """Everything that is made once per machine. The base image is mostly waiting, beside the Go builds."""
        debian.install(debian.missing(), self.progress)
        with ThreadPoolExecutor(1) as beside:
            base = beside.submit(base_image.archive, self.places.cache, self.progress)
            self.binaries.prepare([*components.BUILT, "kubectl", "helm", "pause", "buildctl"])
            base.result()

    def _make_room(self, audit: bool) -> None:
        for folder in _FRESH:
            shutil.rmtree(self.places.cluster / folder, ignore_errors=True)
        self.places.logs.mkdir(parents=True)
        components.issue_certificates(self.places)
        cni_folder = debian.cni_folder()
        if cni_folder is None:
            raise SandboxError(f"CNI plugins are in none of {', '.join(map(str, debian.CNI_FOLDERS))}: install them")
        config_files.write_all(self.places, cni_folder)
        network.remove()
        cgroups.remove()
        cgroups.create()
        init = namespaces.create(self.places, self.binaries.command("pause")[0])
        network.join(init)
        self.progress.say("namespaces, network and control groups are there")
        self._record(audit=audit, complete=False)

    def _start_components(self) -> None:
        """Starts what does not run, in the order of what needs what."""
        init = self.init
        daemons, images = self._components(init), self._images(init)
        first, controllers = ("etcd", "containerd", "kube-apiserver"), ("kube-controller-manager", "kube-scheduler")
        daemons.start(*first)
        self._wait("kube-apiserver", self._reader.is_ready, daemons, *first)
        # Not before: they read RBAC-guarded objects once, at their start.
        daemons.start(*controllers)
        self._wait("containerd", images.store_is_ready, daemons, *first)
        daemons.start("buildkitd", "kubelet", "kube-proxy", "coredns")
        self._wait("the node", lambda: self._reader.node_is_ready(NODE_NAME), daemons, *components.NAMES)
        self._wait("the default ServiceAccount", self._has_default_service_account, daemons, *controllers)
        self._wait("buildkitd", images.builder_is_ready, daemons, "buildkitd")
        images.ensure_base(base_image.archive(self.places.cache, self.progress))
        self.progress.say("the pods' base images are there")

    def _wait(self, what: str, ready: processes.Ready, daemons: Components, *needed: str) -> None:
        hint = f"Logs are in {self.places.logs}."
        alive = functools.partial(daemons.why_ended, *needed)
        processes.wait_until(what, ready, seconds=START_SECONDS, hint=hint, alive=alive)
        self.progress.say(f"{what} is ready")

    def _has_default_service_account(self) -> bool:
        return "metadata" in self._reader.object("/api/v1/namespaces/default/serviceaccounts/default")

    def _down(self) -> None:
        namespaces.end(self.places)
        # The kernel ends what was inside; those outside that waited for it follow a moment later.
        processes.wait_until("the end", lambda: not leftovers.live_processes(self.places), seconds=10)
        if not namespaces.others(self.places):  # their names are fixed: another sandbox's are the same ones
            network.remove()
            cgroups.remove()
        self._settings.unlink(missing_ok=True)
        if left := leftovers.find(self.places):
            raise SandboxError("something of the sandbox is left:\n" + "\n".join(f"  - {one}" for one in left))

    def _components(self, init: int) -> Components:
        return Components(self.places, self.binaries, init, audited=self._recorded().audit)

    def _images(self, init: int) -> Images:
        return Images(self.places, self.binaries, init, self.progress)

    @property
    def _reader(self) -> ApiReader:
        return ApiReader(network.SERVER, Authority(self.places.pki), ADMIN)

    @property
    def _settings(self) -> Path:
        return self.places.cluster / "running.json"

    def _recorded(self) -> _Run:
        try:
            run = _Run(**json.loads(self._settings.read_text()))
        except (OSError, ValueError, TypeError):
            return _Run()
        # Of another run, which was ended by other means than `down`: as good as none.
        return run if run.init == namespaces.find(self.places) else _Run()

    def _record(self, *, audit: bool, complete: bool) -> None:
        run = _Run(init=namespaces.find(self.places), audit=audit, complete=complete)
        self._settings.write_text(json.dumps(asdict(run)))


def _machine_lock(progress: Progress) -> contextlib.AbstractContextManager[None]:
    """One `up`, `down` or `restart` at a time on this machine: addresses and control groups are fixed."""
    if not preflight.is_root():
        return contextlib.nullcontext()  # the preflight says what is missing, in full
    return locks.exclusive(LOCK, "starting or ending a sandbox", progress)
