"""Programs that come as Debian packages: the container runtime, tools, and Prometheus for a test.

Installing them must not start their services: the machine may run containers of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sandbox import processes
from sandbox.errors import SandboxError
from sandbox.paths import Paths
from sandbox.progress import Progress

# What must be on the PATH, and the package that brings it.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "sysctl": "procps",
    "openssl": "openssl",
    "nsenter": "util-linux",
    "mount": "mount",
}
CNI_PACKAGE = "containernetworking-plugins"
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
CNI_PLUGINS = ("bridge", "host-local")
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = (
    "#!/bin/sh\n# Written by the rlhf-operator sandbox while it installs packages: start no service.\nexit 101\n"
)


def cni_folder() -> Path | None:
    """Where the network plugins are installed."""
    for folder in CNI_FOLDERS:
        if all((folder / plugin).exists() for plugin in CNI_PLUGINS):
            return folder
    return None


def missing() -> list[str]:
    """Packages that must still be installed."""
    packages = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return packages if cni_folder() is not None else [*packages, CNI_PACKAGE]


def install(packages: list[str], progress: Progress) -> None:
    """Installs packages without starting their services. Nothing happens for an empty list."""
    _remove_own_policy()
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise SandboxError(f"please install, by your distribution's means: {', '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with progress.step(f"installing {', '.join(packages)}"), _services_stay_stopped():
        wait = "-oDPkg::Lock::Timeout=300"  # for an upgrade that happens to be under way
        processes.run(["apt-get", wait, "update", "-qq"], env=environment)
        command = ["apt-get", wait, "install", "-y", "-qq", "--no-install-recommends", *packages]
        processes.run(command, env=environment)


@contextlib.contextmanager
def _services_stay_stopped() -> Iterator[None]:
    if _POLICY.exists():  # the machine's own
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _remove_own_policy()


def _remove_own_policy() -> None:
    """Also what a killed run left: it would keep every later package of this machine from starting its service."""
    if _POLICY.exists() and _POLICY.read_text() == _POLICY_TEXT:
        _POLICY.unlink()


def prometheus(places: Paths, progress: Progress) -> Path:
    """A `prometheus` program: the machine's, else Debian's package unpacked into the cache (not installed).

    Works without root. Raises SandboxError when there is neither.
    """
    if found := shutil.which("prometheus"):
        return Path(found)
    folder = places.cache / "bin" / "prometheus-debian"
    program = folder / "usr" / "bin" / "prometheus"
    if program.exists():
        return program
    if shutil.which("apt-get") is None:
        raise SandboxError("no prometheus on PATH, and this is no Debian to take it from: install it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with progress.step("fetching Debian's prometheus"), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        # Fetching as the user that apt drops its rights to needs a folder that user may write.
        processes.run(
            ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", "prometheus"], cwd=Path(temporary)
        )
        archive = next(Path(temporary).glob("prometheus_*.deb"))
        unpacked = Path(temporary) / "unpacked"
        processes.run(["dpkg-deb", "--extract", archive, unpacked])
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return program
