"""Lines that say what is happening and for how long, so that a silent minute never looks like a hang."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

HEARTBEAT_SECONDS = 20.0


def duration(seconds: float) -> str:
    """`7.3s`, or `2m05s` from two minutes on."""
    if seconds < 120:
        return f"{seconds:.1f}s"
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


class Progress:
    """Prints `[elapsed] message` to standard error (standard output stays for results)."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._clock = clock
        self._started = clock()
        self._heartbeat = heartbeat

    def say(self, message: str) -> None:
        if not self._quiet:
            print(f"[{duration(self._clock() - self._started):>6}] {message}", file=self._stream, flush=True)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announces `what`, repeats it while it lasts, and says how long it took."""
        self.say(f"{what} ...")
        started = self._clock()
        finished = threading.Event()

        def repeat() -> None:
            while not finished.wait(self._heartbeat):
                self.say(f"{what}: still at it after {duration(self._clock() - started)}")

        ticker = threading.Thread(target=repeat, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            finished.set()
            ticker.join()
        self.say(f"{what}: done in {duration(self._clock() - started)}")
