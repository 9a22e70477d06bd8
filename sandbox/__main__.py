"""Command line: `python -m sandbox --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sandbox import binaries, paths
from sandbox.control_plane import ControlPlane
from sandbox.errors import SandboxError
from sandbox.progress import Progress


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status", "kubeconfig"])
    parser.add_argument("--control-plane", action="store_true")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--bin-dir", type=Path)
    options = parser.parse_args(argv)
    progress = Progress()
    places = paths.from_environment()
    try:
        programs = binaries.from_environment(places, progress, bin_dir=options.bin_dir)
        plane = ControlPlane(options.dir or places.control_plane, programs, audit=options.audit, detached=True)
        match options.command:
            case "up":
                with progress.step("starting etcd and kube-apiserver"):
                    plane.start()
                print(plane.kubeconfig)
            case "down":
                plane.stop()
            case "status":
                print(plane.server if plane.running else "not running")
            case "kubeconfig":
                print(plane.kubeconfig)
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
