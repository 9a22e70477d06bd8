"""What of a sandbox is still in the kernel: the check that `down` ends with."""

from __future__ import annotations

from pathlib import Path

from sandbox import cgroups, namespaces, network, processes
from sandbox.paths import Paths


def mounts(folder: Path, mountinfo: str) -> list[str]:
    """Mount points, or mounts of things, below `folder`, from the text of /proc/self/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        # Fields 4 and 5: what is mounted, and where; spaces in them are written \\040.
        places = [Path(field.replace("\\040", " ")) for field in fields[3:5]]
        if any(place.is_relative_to(folder) for place in places):
            found.append(str(places[1]))
    return found


def find(places: Paths) -> list[str]:
    """Processes, mounts, the interface and control groups of this sandbox that exist; empty after `down`."""
    left = [f"process {process.pid}: {' '.join(process.words)[:100]}" for process in live_processes(places)]
    left += [f"mount {point}" for point in mounts(places.cluster, Path("/proc/self/mountinfo").read_text())]
    if namespaces.others(places):
        return left  # the interface and the control groups are that one's
    if network.exists():
        left.append(f"interface {network.INTERFACE}")
    left += [f"control group {group}" for group in cgroups.remaining()]
    return left


def live_processes(places: Paths) -> list[processes.Marked]:
    """Daemons, what they started, and the processes that brought them into the namespaces."""
    marks = (namespaces.mark(places), f"sandbox-component:{places.cluster}:")
    return [process for mark in marks for process in processes.scan(mark)]
