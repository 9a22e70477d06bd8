"""Mount, PID and network namespaces of the sandbox, all held by one process.

Ending that process is the whole of `down`: the kernel ends every daemon, shim and container with it and
drops every mount.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sandbox import processes
from sandbox.errors import SandboxError
from sandbox.paths import Paths

INIT_MARK = "sandbox-init:"
HOST_NETWORK = Path("/run/hostnet")
KUBELET_ROOT = Path("/run/kubelet")
# Folders that the sandbox covers with its own: the state must not lie below them.
COVERED = (Path("/run"), Path("/var/log"))

# /run becomes private, so sockets and the CNI's leases need no cleaning up and no short path of the checkout.
# The name server file may be a link into /run. Pods' mounts must propagate: rshared.
_INIT = """
set -e
mount --make-rprivate /
resolver=$(readlink -m /etc/resolv.conf)
servers=$(cat /etc/resolv.conf 2>/dev/null || true)
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns /run/cni-ipam /run/containerd /run/buildkit /run/kubelet "$(dirname "$resolver")"
[ -e "$resolver" ] || printf '%s\\n' "$servers" > "$resolver"
touch /run/hostnet
mount --bind /proc/self/ns/net /run/hostnet
mount --bind "$SANDBOX_KUBELET" /run/kubelet
mount --bind "$SANDBOX_POD_LOGS" /var/log
mount --make-rshared /
exec unshare --net sh -c 'ip link set lo up; touch /run/ready; exec "$0"' "$SANDBOX_PAUSE"
"""


def create(places: Paths, pause: str) -> int:
    """Makes the namespaces and returns the pid of their first process."""
    kubelet, logs = places.cluster / "kubelet", places.cluster / "pod-logs"
    for folder in (kubelet, logs):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "SANDBOX_KUBELET": str(kubelet),
        "SANDBOX_POD_LOGS": str(logs),
        "SANDBOX_PAUSE": pause,
    }
    log = places.logs / "init.log"
    unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", _INIT]
    child = processes.start(unshare, mark=mark(places), log=log, env=environment)

    def ready() -> bool:
        pid = find(places)
        return pid is not None and Path(f"/proc/{pid}/root/run/ready").exists()

    def died() -> str | None:
        return None if child.poll() is None else f"their first process ended:\n{processes.tail(log)}"

    processes.wait_until("the sandbox's namespaces", ready, seconds=20, hint=f"See {log}.", alive=died)
    pid = find(places)
    if pid is None:
        raise SandboxError(f"the first process of the sandbox ended at once; see {log}")
    return pid


def mark(places: Paths) -> str:
    return f"{INIT_MARK}{places.cluster}"


def find(places: Paths) -> int | None:
    """The first process of this sandbox's PID namespace, seen from the host."""
    return running().get(places.cluster)


def running() -> dict[Path, int]:
    """First processes of all sandboxes of this machine, by their folder."""
    found = {}
    for process in processes.scan(INIT_MARK):
        if _is_first_in_its_namespace(process.pid):
            found[Path(process.mark.removeprefix(INIT_MARK))] = process.pid
    return found


def others(places: Paths) -> list[Path]:
    """Folders of the sandboxes of this machine that are not this one."""
    return [folder for folder in running() if folder != places.cluster]


def _is_first_in_its_namespace(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    return len(numbers) > 1 and numbers[-1] == "1"


def enter(init: int, argv: Sequence[str | Path]) -> list[str]:
    """The command line that runs `argv` inside."""
    return ["nsenter", f"--target={init}", "--mount", "--pid", "--net", "--", *map(str, argv)]


def run(init: int, argv: Sequence[str | Path], *, input: str | None = None) -> str:
    """Runs a program inside to its end and returns what it printed."""
    return processes.run(enter(init, argv), input=input)


def end(places: Paths) -> None:
    """Ends the first process, and with it everything inside; waits until the kernel is done."""
    for process in reversed(processes.scan(mark(places))):
        processes.end(process.pid, process.mark, grace=0)


def can_be_made() -> str | None:
    """None where this user may make the namespaces, else what the system says."""
    probe = ["unshare", "--mount", "--pid", "--net", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()
