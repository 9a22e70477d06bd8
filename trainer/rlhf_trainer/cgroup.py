"""How often the kernel killed a process of this container for memory, from cgroup v2 or v1. No torch."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def oom_kills(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """The cgroup's oom_kill counter; None where no memory cgroup can be read (then nothing is concluded)."""
    for path in _counter_files(root, membership):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None


def _counter_files(root: Path, membership: Path) -> list[Path]:
    """Candidates, own group first: by its path from the host's root, or as the root of a cgroup namespace."""
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        groups = []
    own = {controllers: path.lstrip("/") for _, controllers, path in groups}
    v2 = [root / own[""] / "memory.events"] if "" in own else []
    v1 = [root / "memory" / own["memory"] / "memory.oom_control"] if "memory" in own else []
    return [*v2, *v1, root / "memory.events", root / "memory" / "memory.oom_control"]


def memory_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes of memory this container may use; None where there is no limit."""
    for counter in _counter_files(root, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (counter.parent / name).read_text().strip()
            except OSError:
                continue
            # v1 writes "no limit" as the largest page-aligned number.
            return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None
