"""A real single-node Kubernetes on this Linux machine, or a control plane alone for tests.

Environment: RLHF_SANDBOX_DIR (state, default .sandbox/ in the checkout), RLHF_SANDBOX_CACHE (built binaries,
default ~/.cache/rlhf-operator), RLHF_SANDBOX_BIN (a folder of programs to use as they are).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sandbox import binaries, components, paths
from sandbox.cluster import Cluster
from sandbox.control_plane import ControlPlane
from sandbox.errors import SandboxError
from sandbox.images import IMAGES
from sandbox.processes import memory_mb
from sandbox.progress import Progress

# Their arguments go through untouched, options included.
PASSED_THROUGH = ("kubectl", "helm", "exec")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root.add_argument("--quiet", action="store_true", help="no progress lines")
    root.add_argument("--bin-dir", type=Path, help="a folder of programs to use as they are")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, *, control_plane: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        if control_plane:
            command.add_argument("--control-plane", action="store_true", help="etcd and kube-apiserver only; no root")
            command.add_argument("--dir", type=Path, help="the control plane's folder, for several at once")
        return command

    up = add("up", "start everything, or what is missing of it", control_plane=True)
    up.add_argument("--audit", action="store_true", help="log every request to the API server")
    add("down", "end everything; images and volumes stay on disk", control_plane=True)
    add("status", "what runs; exit code 1 unless all of it does", control_plane=True)
    add("kubeconfig", "print the administrator's kubeconfig's path", control_plane=True)
    load = add("load", "build the repository's images, those that changed, into the sandbox")
    load.add_argument("images", nargs="*", metavar="IMAGE", help=f"{', '.join(IMAGES)} or a .tar of `docker save`")
    volume = add("volume", "make a volume shared by pods; prints its folder on the host")
    volume.add_argument("name", metavar="NAMESPACE/NAME")
    logs = add("logs", "print a component's log")
    logs.add_argument("component", help=f"{', '.join(components.NAMES)}, init or build-IMAGE")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("-n", "--lines", type=int, default=200)
    restart = add("restart", "end one component and start it again; pods go on")
    restart.add_argument("component", choices=components.NAMES)
    for name, help in zip(PASSED_THROUGH, ("run kubectl", "run Helm", "run a program inside"), strict=True):
        add(name, help)
    return root


def main(argv: list[str] | None = None) -> int:
    ours, theirs = _split(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(ours)
    options.words = theirs
    progress = Progress(quiet=options.quiet)
    try:
        if getattr(options, "control_plane", False):
            return _control_plane(options, progress)
        return _COMMANDS[options.command](Cluster.from_environment(progress, bin_dir=options.bin_dir), options)
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our words, and those of a program we pass through to: `kubectl -n x` is no option of ours."""
    at = next((i for i, word in enumerate(argv) if word in PASSED_THROUGH), len(argv))
    return argv[: at + 1], argv[at + 1 :]


def _control_plane(options: argparse.Namespace, progress: Progress) -> int:
    places = paths.from_environment()
    programs = binaries.from_environment(places, progress, bin_dir=options.bin_dir)
    audited = bool(getattr(options, "audit", False))
    plane = ControlPlane(options.dir or places.control_plane, programs, audit=audited, detached=True)
    match options.command:
        case "up":
            plane.start()
            progress.say(f"etcd and kube-apiserver run: KUBECONFIG={plane.kubeconfig}")
        case "down":
            plane.stop()
        case "status":
            print(f"{plane.server} {plane.pids}" if plane.running else "not running")
            return 0 if plane.running else 1
        case "kubeconfig":
            print(plane.kubeconfig)
    return 0


def _up(cluster: Cluster, options: argparse.Namespace) -> int:
    cluster.up(audit=options.audit)
    return 0


def _down(cluster: Cluster, options: argparse.Namespace) -> int:  # noqa: ARG001  one signature for all commands
    cluster.down()
    return 0


def _status(cluster: Cluster, options: argparse.Namespace) -> int:  # noqa: ARG001  one signature for all commands
    status = cluster.status()
    for name in components.NAMES:
        pid = status.pids.get(name)
        state = f"running  pid {pid:>7}  {memory_mb(pid):>5} MB" if pid is not None else "not running"
        print(f"{name:26}{state}")
    print(f"{'node':26}{'Ready' if status.ready else 'not ready'}")
    if status.ready:
        print(f"\nKUBECONFIG={cluster.kubeconfig}")
    return 0 if status.ready else 1


def _kubeconfig(cluster: Cluster, options: argparse.Namespace) -> int:  # noqa: ARG001  one signature for all commands
    print(cluster.kubeconfig)
    return 0


def _load(cluster: Cluster, options: argparse.Namespace) -> int:
    cluster.load(options.images)
    return 0


def _volume(cluster: Cluster, options: argparse.Namespace) -> int:
    print(cluster.volume(options.name))
    return 0


def _logs(cluster: Cluster, options: argparse.Namespace) -> int:
    log = cluster.places.logs / f"{options.component}.log"
    if not log.exists():
        known = ", ".join(sorted(path.stem for path in log.parent.glob("*.log")))
        raise SandboxError(f"there is no log of {options.component!r}; there are: {known or 'none, it was never up'}")
    follow = ["--follow=name"] if options.follow else []
    return _call(["tail", f"--lines={options.lines}", *follow, str(log)])


def _restart(cluster: Cluster, options: argparse.Namespace) -> int:
    cluster.restart(options.component)
    return 0


def _kubectl(cluster: Cluster, options: argparse.Namespace) -> int:
    return _call(cluster.kubectl_command(*options.words))


def _helm(cluster: Cluster, options: argparse.Namespace) -> int:
    return _call(cluster.helm_command(*options.words))


def _exec(cluster: Cluster, options: argparse.Namespace) -> int:
    return _call(cluster.enter_command(*options.words))


_COMMANDS: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
    "up": _up,
    "down": _down,
    "status": _status,
    "kubeconfig": _kubeconfig,
    "load": _load,
    "volume": _volume,
    "logs": _logs,
    "restart": _restart,
    "kubectl": _kubectl,
    "helm": _helm,
    "exec": _exec,
}


def _call(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
