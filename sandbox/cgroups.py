"""The control group all pods and image builds run in, on cgroup v1 and v2."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from sandbox.errors import SandboxError

MOUNT = Path("/sys/fs/cgroup")
NAME = "rlhf-sandbox"
REQUIRED = ("cpu", "memory", "pids")
# Pods and builds are many processes; as one group they would get the share of a single process outside.
_CPU_WEIGHTS = {"cpu.shares": "4096", "cpu.weight": "400"}  # four times the default, on v1 and v2
_V2_CONTROLLERS = "+cpu +memory +pids +cpuset +io"


def is_v2(mount: Path = MOUNT) -> bool:
    return (mount / "cgroup.controllers").exists()


def hierarchies(mount: Path = MOUNT) -> list[Path]:
    """The hierarchies of cgroup v1, or the one tree of v2."""
    if is_v2(mount):
        return [mount]
    if not mount.is_dir():
        return []
    return sorted(entry for entry in mount.iterdir() if (entry / "cgroup.procs").exists())


def controllers(mount: Path = MOUNT) -> set[str]:
    """Names of the controllers that can be used."""
    if is_v2(mount):
        return set((mount / "cgroup.controllers").read_text().split())
    # A v1 hierarchy may hold several, named "cpu,cpuacct".
    return {name for entry in hierarchies(mount) for name in entry.name.split(",")}


def create(mount: Path = MOUNT) -> None:
    for hierarchy in hierarchies(mount):
        group = hierarchy / NAME
        group.mkdir(exist_ok=True)
        if is_v2(mount):
            for parent in (hierarchy, group):
                (parent / "cgroup.subtree_control").write_text(_V2_CONTROLLERS)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: a new cpuset is empty, and refuses every process
            if not is_v2(mount) and (hierarchy / file).exists():
                (group / file).write_text((hierarchy / file).read_text())
        for file, weight in _CPU_WEIGHTS.items():
            if (group / file).exists():
                (group / file).write_text(weight)


def remaining(mount: Path = MOUNT) -> list[Path]:
    """Every group of the sandbox that exists, innermost first."""
    groups = [hierarchy / NAME for hierarchy in hierarchies(mount)]
    return [Path(path) for group in groups if group.is_dir() for path, _, _ in os.walk(group, topdown=False)]


def remove(mount: Path = MOUNT, *, seconds: float = 10.0) -> None:
    """Removes all groups; the kernel may take a moment to let go of processes just ended."""
    deadline = time.monotonic() + seconds
    while left := remaining(mount):
        for group in left:
            with contextlib.suppress(OSError):
                group.rmdir()
        if time.monotonic() > deadline and remaining(mount):
            raise SandboxError(f"control groups cannot be removed, processes are in them: {', '.join(map(str, left))}")
        time.sleep(0.02)
