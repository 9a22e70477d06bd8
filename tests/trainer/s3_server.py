"""A real S3 server for tests: versitygw, built from the pinned Go module beside this file and kept in ``.build/``.

It checks signatures, so that a wrong secret is refused as it would be anywhere else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import locks
from sandbox.binaries import content_key
from sandbox.progress import Progress

SOURCES = Path(__file__).parent / "s3server"
CACHE = Path(__file__).parents[2] / ".build" / "s3server"
PACKAGE = "github.com/versity/versitygw/cmd/versitygw"
_FLAGS = ("-trimpath", "-gcflags=all=-dwarf=false", "-ldflags=-s -w")
_START_SECONDS = 20.0


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket; ``environment`` is what a client needs."""

    bucket: str
    folder: Path
    environment: dict[str, str]


def binary() -> Path:
    """The server's program, built on first use (about 3 minutes of one core)."""
    folder = CACHE / content_key(SOURCES, _FLAGS, "linux")
    program = folder / "versitygw"
    if not program.is_file():
        progress = Progress()
        with locks.exclusive(CACHE / "lock", "building the S3 server", progress):
            if not program.is_file():
                with progress.step("building versitygw, an S3 server (about 3 minutes, once)"):
                    _build(program)
    return program


@contextlib.contextmanager
def running(folder: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[S3Server]:
    """Serves ``folder`` on a free port of ``address`` until the block ends; ``prefix`` is a command that runs it where
    that address is."""
    bucket = "feedback"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"ROOT_ACCESS_KEY": "desk", "ROOT_SECRET_KEY": "desk-secret"}
    # Attributes in a folder of their own: not every file system of a test machine has extended attributes.
    served, meta = folder / "served", folder / "meta"
    (served / bucket).mkdir(parents=True)
    meta.mkdir()
    command = [*prefix, binary(), "--port", f"{address}:{port}", "--quiet", "posix", "--sidecar", meta, served]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | keys, stdout=log, stderr=log)
    try:
        _wait_for((address, port), process, folder / "server.log")
        yield S3Server(
            bucket,
            served / bucket,
            {
                "AWS_ENDPOINT_URL": f"http://{address}:{port}",
                "AWS_ACCESS_KEY_ID": keys["ROOT_ACCESS_KEY"],
                "AWS_SECRET_ACCESS_KEY": keys["ROOT_SECRET_KEY"],
                "AWS_REGION": "us-east-1",
            },
        )
    finally:
        process.terminate()
        process.wait(timeout=10)


def _build(program: Path) -> None:
    if shutil.which("go") is None:
        raise RuntimeError("the S3 server of the tests is built with Go; install Go 1.26 or newer (https://go.dev/dl)")
    unfinished = program.with_name("unfinished")
    subprocess.run(
        ["go", "build", *_FLAGS, "-o", str(unfinished), PACKAGE],
        cwd=SOURCES,
        check=True,
    )
    unfinished.replace(program)


def _wait_for(address: tuple[str, int], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')}")
