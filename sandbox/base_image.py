"""The Dockerfiles' base image, made of Debian packages where no container registry is in reach.

It goes by the name that the Dockerfiles give (elsewhere that name is pulled) and has what they use of it:
Python 3.11 with venv, and CA certificates.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sandbox import processes
from sandbox.errors import SandboxError
from sandbox.progress import Progress

REFERENCE = "docker.io/library/python:3.11-slim-bookworm"
SUITE = "bookworm"
ARCHIVE = "base.tar"
_PACKAGES = "python3.11,python3-venv,ca-certificates"
# The machine's own apt sources and settings must not end up in an image.
_REMOVED = (
    "etc/apt/sources.list",
    "etc/apt/sources.list.d/*",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/*",
    "usr/lib/python3.11/EXTERNALLY-MANAGED",
)
_UNWANTED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
_OPTIONS = (
    "--quiet",
    "--format=tar",
    "--mode=root",
    "--variant=minbase",
    f"--include={_PACKAGES}",
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Acquire::Languages "none"',
    *(f"--dpkgopt=path-exclude={pattern}" for pattern in _UNWANTED),
    "--customize-hook=rm -rf " + " ".join(f'"$1"/{path}' for path in _REMOVED),
    '--customize-hook=ln -s python3 "$1"/usr/bin/python',
)
DOCKERFILE = f"""FROM scratch
ADD {ARCHIVE} /
ENV LANG=C.UTF-8 PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
"""


def key() -> str:
    """Names an archive made with these options. Delete the cache to take newer packages."""
    return hashlib.sha256("\0".join([SUITE, *_OPTIONS, DOCKERFILE]).encode()).hexdigest()[:16]


def apt_sources(folder: Path = Path("/etc/apt")) -> list[Path]:
    """This machine's apt sources for Debian itself, if it is of the suite: mirrors set up here are used."""
    files = [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]
    files += sorted(folder.glob("sources.list.d/*.sources"))
    return [file for file in files if file.is_file() and _is_for_suite(file.read_text())]


def _is_for_suite(text: str) -> bool:
    words = {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}
    # Other vendors name the suite too; only Debian has its security updates.
    return SUITE in words and f"{SUITE}-security" in words


def archive(cache: Path, progress: Progress) -> Path:
    """The archive of the base image's files, made on first use (about a minute)."""
    folder = cache / "base" / f"python-3.11-{key()}"
    path = folder / ARCHIVE
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{ARCHIVE}.{os.getpid()}.new"
    try:
        with progress.step("making the base image of Debian packages (about a minute, once)"):
            processes.run(["mmdebstrap", *_OPTIONS, SUITE, unfinished, *apt_sources()])
        unfinished.rename(path)
    except SandboxError as error:
        raise SandboxError(f"the base image {REFERENCE} could not be made: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path
