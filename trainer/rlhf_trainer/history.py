"""One JSON line per step beside the checkpoints: the curve of an attempt, for charts and post-mortems.

A later attempt repeats the steps that were lost, in its own folder; a reader of a whole run lets the later line win.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

HISTORY_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class History:
    """Appends to ``<attempt>/metrics.jsonl``; a full or lost disk is reported once and never ends training."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HISTORY_FILE
        self._broken = False

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._broken:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, **metrics}, sort_keys=True) + "\n")
        except OSError as error:
            self._broken = True
            logger.warning("%s: no further metrics are kept (%s); training goes on", self._path, error)
