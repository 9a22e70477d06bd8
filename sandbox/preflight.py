"""Whether this machine can run the sandbox: facts are gathered at the edge, judged by a pure function."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sandbox import cgroups, debian, images, namespaces, network
from sandbox.errors import SandboxError
from sandbox.paths import Paths

# Binaries and base image 0.4 GB, images 11 GB, twice the largest layer while it is built.
DISK_GB = 20.0
DISK_GB_WITH_IMAGES = 6.0
MEMORY_GB = 4.0

ELSEWHERE = (
    "Any other cluster serves as well, for instance one made by `kind create cluster`:"
    " make demo KUBECONFIG=$HOME/.kube/config"
)


@dataclass(frozen=True)
class Facts:
    """What was found on this machine. None or empty: no objection."""

    system: str = "Linux"
    is_root: bool = True
    missing_packages: tuple[str, ...] = ()
    has_apt: bool = True
    cgroup_controllers: frozenset[str] = frozenset(cgroups.REQUIRED)
    namespaces_refused: str | None = None
    overlay_refused: str | None = None
    overlapping_routes: tuple[str, ...] = ()
    other_sandbox: Path | None = None
    state: Path = Path("/state")
    free_disk_gb: float = 100.0
    has_images: bool = False
    memory_gb: float = 16.0


@dataclass(frozen=True)
class Problem:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}\n    → {self.remedy}"


def problems(facts: Facts) -> list[Problem]:
    """Everything that stands in the way, with what to do about each."""
    if facts.system != "Linux":
        return [Problem(f"The sandbox needs Linux; this is {facts.system}.", "Use a Linux machine or VM.")]
    if not facts.is_root:
        # Without root the other questions cannot be asked.
        return [Problem("The sandbox needs root, to make namespaces and run containers.", "Use sudo, or a VM.")]
    return [*_software(facts), *_kernel(facts), *_network(facts), *_room(facts)]


def _software(facts: Facts) -> list[Problem]:
    if facts.has_apt or not facts.missing_packages:
        return []  # `up` installs what is missing
    names = ", ".join(facts.missing_packages)
    return [Problem(f"Programs are missing (by their Debian packages): {names}.", "Install them; apt-get is not here.")]


def _kernel(facts: Facts) -> list[Problem]:
    found = []
    absent = [name for name in cgroups.REQUIRED if name not in facts.cgroup_controllers]
    if absent:
        remedy = "Mount /sys/fs/cgroup with them; in a container, run it privileged with its own cgroup namespace."
        found.append(Problem(f"Control group controllers are missing: {', '.join(absent)}.", remedy))
    if facts.namespaces_refused is not None:
        remedy = "In a container, run it privileged (CAP_SYS_ADMIN and CAP_NET_ADMIN)."
        found.append(Problem(f"Namespaces cannot be made: {facts.namespaces_refused}.", remedy))
    if facts.overlay_refused is not None:
        remedy = "Set RLHF_SANDBOX_DIR to a folder on ext4 or xfs, not on an overlay or network file system."
        found.append(Problem(f"{facts.state} cannot carry image layers (overlayfs): {facts.overlay_refused}.", remedy))
    return found


def _network(facts: Facts) -> list[Problem]:
    found = []
    if facts.other_sandbox is not None:
        folder = facts.other_sandbox
        end = f"RLHF_SANDBOX_DIR={folder.parent} python -m sandbox down"
        remedy = f"Use that one (kubeconfig: {folder / 'kubeconfig'}), or end it: {end}"
        found.append(Problem(f"Another sandbox runs, from {folder}; addresses are fixed, so one at a time.", remedy))
    if facts.overlapping_routes:
        ranges = ", ".join(network.CIDRS)
        what = (
            f"Routes of this machine overlap the sandbox's addresses ({ranges}): {', '.join(facts.overlapping_routes)}."
        )
        found.append(Problem(what, "Remove them, or use another machine or cluster."))
    return found


def _room(facts: Facts) -> list[Problem]:
    found = []
    for covered in namespaces.COVERED:
        if facts.state.is_relative_to(covered):
            what = f"The sandbox's folder {facts.state} lies below {covered}, which pods' daemons see as their own."
            found.append(Problem(what, "Set RLHF_SANDBOX_DIR to another folder."))
    needed = DISK_GB_WITH_IMAGES if facts.has_images else DISK_GB
    if facts.free_disk_gb < needed:
        what = f"{facts.free_disk_gb:.0f} GB are free at {facts.state}; {needed:.0f} GB are needed."
        found.append(Problem(what, "Free some, or set RLHF_SANDBOX_DIR to a folder on a larger disk."))
    if facts.memory_gb < MEMORY_GB:
        what = f"{facts.memory_gb:.1f} GB of memory are available; training pods need {MEMORY_GB:.0f} GB."
        found.append(Problem(what, "End other programs, or use a larger machine."))
    return found


def gather(places: Paths) -> Facts:
    """Looks at this machine; makes no lasting change."""
    basic = Facts(system=platform.system(), is_root=is_root())
    if basic.system != "Linux" or not basic.is_root:
        return basic
    places.cluster.mkdir(parents=True, exist_ok=True)
    has_unshare, has_ip = (shutil.which(program) is not None for program in ("unshare", "ip"))
    others = namespaces.others(places)
    own_network = bool(others) or namespaces.find(places) is not None
    return Facts(
        missing_packages=tuple(debian.missing()),
        has_apt=shutil.which("apt-get") is not None,
        cgroup_controllers=frozenset(cgroups.controllers()),
        namespaces_refused=namespaces.can_be_made() if has_unshare else None,
        overlay_refused=_try_overlay(places.cluster) if has_unshare else None,
        overlapping_routes=_overlapping_routes() if has_ip and not own_network else (),
        other_sandbox=others[0] if others else None,
        state=places.state.resolve(),
        free_disk_gb=shutil.disk_usage(places.cluster).free / 1e9,
        has_images=images.records(places).exists(),
        memory_gb=_available_memory_gb(),
    )


def _overlapping_routes() -> tuple[str, ...]:
    return tuple(network.overlapping(network.foreign_routes()))


def check(places: Paths) -> None:
    """Raises SandboxError that lists every problem, and says how to use another cluster instead."""
    found = problems(gather(places))
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise SandboxError(f"this machine cannot run the sandbox as it is:\n{lines}\n  {ELSEWHERE}")


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _try_overlay(folder: Path) -> str | None:
    """None if an overlay can be mounted over folders here; tried in a mount namespace of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for part in ("lower", "upper", "work", "merged"):
            (Path(name) / part).mkdir()
        script = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged"
        probe = ["unshare", "--mount", "sh", "-c", script]
        done = subprocess.run(probe, cwd=name, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().rpartition(": ")[2].rstrip(".")


def _available_memory_gb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0
