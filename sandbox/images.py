"""Images in the sandbox: the repository's own, built by content, and the two that cannot be pulled."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import base_image, locks, namespaces, processes
from sandbox.binaries import Binaries
from sandbox.config_files import BUILDKIT_SOCKET, CONTAINERD_SOCKET, IMAGE_NAMESPACE, PAUSE_IMAGE
from sandbox.errors import SandboxError
from sandbox.paths import CHECKOUT, Paths
from sandbox.progress import Progress

_IGNORED = frozenset({"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"})
# The layers stay on this machine: compressing 5 GB would double the time.
_OUTPUT = "type=image,name={reference},unpack=true,compression=uncompressed"


@dataclass(frozen=True)
class Image:
    """An image of this repository; `sources` is all that its Dockerfile copies."""

    name: str
    dockerfile: str
    sources: tuple[str, ...]

    @property
    def reference(self) -> str:
        """As the kubelet knows it; pods may say `rlhf-operator:dev` and need imagePullPolicy IfNotPresent."""
        return f"docker.io/library/rlhf-{self.name}:dev"


IMAGES: Mapping[str, Image] = {
    image.name: image
    for image in (
        Image(
            "operator",
            "Dockerfile.operator",
            ("pyproject.toml", "uv.lock", "operator/rlhf_operator", "operator/rlhf_gateway", "trainer/rlhf_trainer"),
        ),
        Image("trainer", "Dockerfile.trainer", ("pyproject.toml", "uv.lock", "trainer/rlhf_trainer")),
    )
}


def source_files(image: Image, checkout: Path) -> list[Path]:
    """Every file the image is made of, in a fixed order."""
    files = [checkout / image.dockerfile, checkout / ".dockerignore"]
    for source in image.sources:
        path = checkout / source
        if not path.exists():
            raise SandboxError(f"{image.dockerfile} needs {source}, which is not in {checkout}")
        files += [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [file for file in files if not _IGNORED & set(file.relative_to(checkout).parts)]


def content_key(image: Image, checkout: Path) -> str:
    """Changes whenever the image would: hash of its files and of the base image's recipe."""
    digest = hashlib.sha256(base_image.key().encode())
    for file in source_files(image, checkout):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(checkout)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def build_secrets(etc: Path = Path("/etc")) -> list[str]:
    """What this machine's package managers need, mounted while RUN steps last and never part of an image."""
    candidates = {"ca": etc / "ssl/certs/ca-certificates.crt", "pip": etc / "pip.conf"}
    sources = base_image.apt_sources(etc / "apt")
    if sources:
        candidates["apt"] = sources[0]
    return [
        word for name, path in candidates.items() if path.is_file() for word in ("--secret", f"id={name},src={path}")
    ]


def records(places: Paths) -> Path:
    """Where it is written down what images were built of."""
    return places.cluster / "images"


@dataclass(frozen=True)
class Images:
    """The image store of a running sandbox, whose first process is `init`."""

    places: Paths
    binaries: Binaries
    init: int
    progress: Progress
    checkout: Path = CHECKOUT

    def present(self) -> set[str]:
        """References of all images the kubelet can start."""
        return set(self._ctr("list", "--quiet").split())

    def store_is_ready(self) -> bool:
        self.present()
        return True

    def builder_is_ready(self) -> bool:
        namespaces.run(self.init, [*self._buildctl_command(), "debug", "workers"])
        return True

    def ensure_base(self, archive: Path) -> None:
        """The pod sandbox's image and the Dockerfiles' base, neither of which anything is pulled for."""
        present = self.present()
        pause = Path(self.binaries.command("pause")[0])
        dockerfile = f'FROM scratch\nADD {pause.name} /pause\nENTRYPOINT ["/pause"]\n'
        for reference, context, text, key in (
            (PAUSE_IMAGE, pause.parent, dockerfile, pause.parent.name),
            (base_image.REFERENCE, archive.parent, base_image.DOCKERFILE, base_image.key()),
        ):
            if reference not in present or self._built(reference) != key:
                with tempfile.TemporaryDirectory(dir=self.places.cluster) as folder:
                    (Path(folder) / "Dockerfile").write_text(text)
                    self._buildctl(reference, context, Path(folder), "Dockerfile", ())
                self._record(reference, key)

    def load(self, names: Iterable[str] = ()) -> None:
        """Builds images by name (all of them by default) unless what they are made of is unchanged.

        A name that ends in `.tar` is an archive, as `docker save` writes it.
        """
        wanted = tuple(names) or tuple(IMAGES)
        for name in wanted:
            if name not in IMAGES and not name.endswith(".tar"):
                raise SandboxError(f"no image is called {name!r}: choose of {', '.join(IMAGES)}, or name a .tar file")
        for name in wanted:
            if name in IMAGES:
                lock = self._records / f"{name}.lock"
                with locks.exclusive(lock, f"building the image {name}", self.progress):
                    self._load(IMAGES[name])
            else:
                self._import(Path(name))

    def tidy(self) -> None:
        """Frees what earlier builds held.

        containerd keeps a name `sha256:...` for every image it ever saw, which pins its layers for ever.
        """
        rows = [line.split() for line in self._ctr("list").splitlines()[1:]]
        tagged = {row[2] for row in rows if not row[0].startswith("sha256:")}
        old = [row[0] for row in rows if row[0].startswith("sha256:") and row[2] not in tagged]
        if old:
            self._ctr("remove", "--sync", *old)

    def _load(self, image: Image) -> None:
        key = content_key(image, self.checkout)
        if self._built(image.reference) == key and image.reference in self.present():
            self.progress.say(f"image {image.reference} is up to date")
            return
        with self.progress.step(f"building image {image.reference} from {image.dockerfile}"):
            self._buildctl(image.reference, self.checkout, self.checkout, image.dockerfile, build_secrets())
            self._record(image.reference, key)
            self.tidy()

    def _import(self, archive: Path) -> None:
        if not archive.is_file():
            raise SandboxError(f"no such image archive: {archive}")
        with self.progress.step(f"importing {archive}"):
            self._ctr("import", str(archive.absolute()))

    def _buildctl(
        self, reference: str, context: Path, dockerfiles: Path, filename: str, secrets: Sequence[str]
    ) -> None:
        command = [
            *self._buildctl_command(),
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            "--opt=image-resolve-mode=local",
            f"--opt=filename={filename}",
            f"--local=context={context}",
            f"--local=dockerfile={dockerfiles}",
            f"--output={_OUTPUT.format(reference=reference)}",
            *secrets,
        ]
        log = self.places.logs / f"build-{reference.rpartition('/')[2].replace(':', '-')}.log"
        with log.open("wb") as output:
            output.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {reference}\n".encode())
            output.flush()
            try:
                processes.run(namespaces.enter(self.init, command), log=output)
            except SandboxError as error:
                raise SandboxError(
                    f"image {reference} was not built; {log} ends:\n{processes.tail(log, 30)}"
                ) from error

    def _buildctl_command(self) -> list[str]:
        return [*self.binaries.command("buildctl"), f"--addr=unix://{BUILDKIT_SOCKET}"]

    def _ctr(self, *words: str) -> str:
        command = ["ctr", f"--address={CONTAINERD_SOCKET}", f"--namespace={IMAGE_NAMESPACE}", "images", *words]
        return namespaces.run(self.init, command)

    @property
    def _records(self) -> Path:
        return records(self.places)

    def _record_of(self, reference: str) -> Path:
        return self._records / f"{reference.replace('/', '_')}.key"

    def _built(self, reference: str) -> str | None:
        """The key of what this image was built of."""
        try:
            return self._record_of(reference).read_text()
        except OSError:
            return None

    def _record(self, reference: str, key: str) -> None:
        self._records.mkdir(exist_ok=True)
        self._record_of(reference).write_text(key)
