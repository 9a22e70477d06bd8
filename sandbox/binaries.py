"""Finds the programs of the sandbox: those the user names, else on PATH at the right version, else built.

What is built comes from the pinned Go modules beside this file and is kept in the user's cache under the
hash of its sources and flags, so a fresh checkout builds nothing again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import debian, locks, paths, processes
from sandbox.errors import SandboxError
from sandbox.progress import Progress

KUBERNETES_VERSION = "1.35.4"
BIN_DIR_VARIABLE = "RLHF_SANDBOX_BIN"
# The folder of etcd, kube-apiserver and kubectl that setup-envtest prepares.
ENVTEST_VARIABLE = "KUBEBUILDER_ASSETS"

_VERSION_PACKAGE = "k8s.io/component-base/version"
_KUBE_LDFLAGS = (
    "-s -w"
    f" -X {_VERSION_PACKAGE}.gitVersion=v{KUBERNETES_VERSION}"
    f" -X {_VERSION_PACKAGE}.gitMajor=1"
    f" -X {_VERSION_PACKAGE}.gitMinor=35"
    f" -X {_VERSION_PACKAGE}.gitTreeState=clean"
    f" -X {_VERSION_PACKAGE}.gitCommit=none"
    f" -X {_VERSION_PACKAGE}.buildDate=1970-01-01T00:00:00Z"
)
# No symbol tables, no debug information: a third of the size and of the build time.
_SLIM = ("-trimpath", "-gcflags=all=-dwarf=false")


@dataclass(frozen=True)
class Module:
    """A pinned Go module beside this file, and how its programs are built."""

    name: str
    flags: tuple[str, ...]
    packages: tuple[str, ...]
    outputs: tuple[str, ...]
    about: str

    @property
    def sources(self) -> Path:
        return paths.SOURCES / self.name


KUBE = Module(
    name="kube",
    flags=(*_SLIM, f"-ldflags={_KUBE_LDFLAGS}"),
    packages=(".",),
    outputs=("kube",),
    about="Kubernetes, etcd, CoreDNS, Helm and kubectl in one binary (about 5 minutes on 2 cores, once)",
)
TOOLS = Module(
    name="tools",
    flags=(*_SLIM, "-ldflags=-s -w"),
    packages=("github.com/moby/buildkit/cmd/buildkitd", "github.com/moby/buildkit/cmd/buildctl"),
    outputs=("buildkitd", "buildctl"),
    about="BuildKit (about 2 minutes on 2 cores, once)",
)
PAUSE = Module(
    name="pause",
    flags=("-ldflags=-s -w",),
    packages=("main.go",),
    outputs=("pause",),
    about="the first process of pods",
)


@dataclass(frozen=True)
class Program:
    """A program, the module it can be built from, and how an existing one shows its version."""

    name: str
    module: Module
    version_arguments: tuple[str, ...] = ()
    version_pattern: str = ""


def _kubernetes(name: str) -> Program:
    return Program(name, KUBE, ("--version",), rf"Kubernetes v{re.escape(KUBERNETES_VERSION)}\b")


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program("etcd", KUBE, ("--version",), r"etcd Version: 3\.6\."),
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kubelet"),
        _kubernetes("kube-proxy"),
        Program("coredns", KUBE, ("-version",), r"CoreDNS-1\.12\."),
        Program("helm", KUBE, ("version", "--short"), r"v4\.1\."),
        # kubectl supports servers one minor version older or newer.
        Program("kubectl", KUBE, ("version", "--client"), r"Client Version: v1\.3[456]\."),
        Program("buildkitd", TOOLS, ("--version",), r" v?0\.34\."),
        Program("buildctl", TOOLS, ("--version",), r" v?0\.34\."),
        # Nothing called `pause` on a PATH can be trusted to be this one.
        Program("pause", PAUSE),
    )
}


def content_key(sources: Path, flags: Iterable[str], target: str) -> str:
    """Hash of every file below `sources`, the build flags and the target: names a build in the cache."""
    digest = hashlib.sha256()
    for file in sorted(path for path in sources.rglob("*") if path.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(sources)}\0{len(content)}\0".encode())
        digest.update(content)
    digest.update("\0".join([*flags, target]).encode())
    return digest.hexdigest()[:16]


@dataclass
class Binaries:
    """Resolves program names to command lines, building what is missing on first use."""

    cache: Path
    progress: Progress
    bin_dirs: tuple[Path, ...] = ()
    search_path: str | None = None
    _commands: dict[str, list[str]] = field(default_factory=dict)

    def command(self, name: str) -> list[str]:
        """The words that start program `name`. Raises SandboxError when it cannot be had."""
        if name not in self._commands:
            self._commands[name] = self._resolve(PROGRAMS[name])
        return list(self._commands[name])

    def prepare(self, names: Iterable[str]) -> None:
        """Resolves all of `names` now, so that the building happens at one place."""
        for name in names:
            self.command(name)

    def _resolve(self, program: Program) -> list[str]:
        for folder in self.bin_dirs:
            if os.access(folder / program.name, os.X_OK):
                return [str(folder / program.name)]
        if program.version_pattern:
            found = shutil.which(program.name, path=self.search_path)
            if found and _has_version(found, program):
                return [found]
        folder = self._built(program.module)
        if program.module is KUBE:
            return [str(folder / "kube"), program.name]
        return [str(folder / program.name)]

    def _built(self, module: Module) -> Path:
        key = content_key(module.sources, module.flags, f"{platform.system()}-{platform.machine()}")
        folder = self.cache / "bin" / f"{module.name}-{key}"
        if folder.is_dir():
            return folder
        with locks.exclusive(folder.parent / f"{module.name}.lock", f"building {module.name}", self.progress):
            if not folder.is_dir():
                self._build(module, folder)
        return folder

    def _build(self, module: Module, folder: Path) -> None:
        if shutil.which("go") is None:
            raise SandboxError(
                f"{', '.join(module.outputs)} must be built, but Go is not installed. Install Go 1.26 or newer"
                f" (https://go.dev/dl), or name a folder with {', '.join(_programs_of(module))} by"
                f" {BIN_DIR_VARIABLE}=FOLDER or --bin-dir FOLDER."
            )
        unfinished = Path(tempfile.mkdtemp(prefix=f"{module.name}-", suffix=".new", dir=folder.parent))
        try:
            # A trailing slash makes -o a folder: every package's program lands in it by its own name.
            output = f"{unfinished}/" if len(module.packages) > 1 else str(unfinished / module.outputs[0])
            with self.progress.step(f"building {module.about}"):
                processes.run(
                    ["go", "build", *module.flags, "-o", output, *module.packages],
                    cwd=module.sources,
                    env={**os.environ, "CGO_ENABLED": "0"},
                )
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _programs_of(module: Module) -> list[str]:
    return [program.name for program in PROGRAMS.values() if program.module is module]


def _has_version(executable: str, program: Program) -> bool:
    try:
        said = processes.run([executable, *program.version_arguments])
    except SandboxError:
        return False
    return re.search(program.version_pattern, said) is not None


def from_environment(
    places: paths.Paths,
    progress: Progress,
    *,
    bin_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Binaries:
    """Looks in `bin_dir`, then in the folders that RLHF_SANDBOX_BIN and KUBEBUILDER_ASSETS name."""
    named = [bin_dir] if bin_dir is not None else []
    variables = (BIN_DIR_VARIABLE, ENVTEST_VARIABLE)
    named.extend(Path(environment[name]) for name in variables if environment.get(name))
    for folder in named:
        if not folder.is_dir():
            raise SandboxError(f"the folder of programs {folder} does not exist (--bin-dir, {BIN_DIR_VARIABLE})")
    return Binaries(cache=places.cache, progress=progress, bin_dirs=tuple(named))


def prometheus() -> Path:
    """A real Prometheus server for tests: the machine's, else Debian's, unpacked into the cache, not installed."""
    return debian.prometheus(paths.from_environment(), Progress())
