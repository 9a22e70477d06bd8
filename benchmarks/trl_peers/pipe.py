"""How the driver and a side talk: a line on standard input lets one step run, a line of JSON tells its figures."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Stepper:
    """Called at the end of every step: reports it, waits for the word, lets the next begin."""

    def __init__(self) -> None:
        # Libraries print to standard output as well; the pipe is kept apart from them.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began: float | None = None

    def ended(self, reply: float) -> None:
        """``reply``: mean tokens of the step's responses; 0 where the side does not know."""
        now = time.perf_counter()
        if self._began is None:  # the first step warms caches up and is not asked for
            self._say({"ready": True, "threads": torch.get_num_threads()})
        else:
            self._say({"seconds": now - self._began, "reply": reply})
        if sys.stdin.readline().strip() != "step":
            self._say({"peak": _peak()})
            os._exit(0)
        self._began = time.perf_counter()

    def _say(self, figures: dict[str, Any]) -> None:
        self._out.write(json.dumps(figures) + "\n")
        self._out.flush()


def _peak() -> int:
    """Peak resident memory in bytes, of this program alone: getrusage would tell the peak of the process that started
    it too, which is inherited."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
