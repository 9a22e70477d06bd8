"""Locks between commands: held by a process, released by the kernel however it ends."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sandbox.progress import Progress


@contextlib.contextmanager
def exclusive(path: Path, doing: str, progress: Progress) -> Iterator[None]:
    """Waits, and says so, while another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"another process is {doing}; waiting for it ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
