"""How the driver and a side talk: a line on standard input lets one step run, a line of JSON tells its figures."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import torch


class Stepper:
    """Called at the end of every step: reports it, waits for the word, lets the next begin."""

    def __init__(self) -> None:
        # Libraries print to standard output as well; the pipe is kept apart from them.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began: float | None = None

    def ended(self, tokens: float) -> None:
        """``tokens``: prompt and response tokens of the step."""
        now = time.perf_counter()
        if self._began is None:  # the first step warms caches up and is not asked for
            self._say({"ready": True, "threads": torch.get_num_threads()})
        else:
            self._say({"seconds": now - self._began, "tokens": tokens})
        if sys.stdin.readline().strip() != "step":
            self._say({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
            os._exit(0)
        self._began = time.perf_counter()

    def _say(self, figures: dict[str, Any]) -> None:
        self._out.write(json.dumps(figures) + "\n")
        self._out.flush()
