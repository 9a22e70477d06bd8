"""One JSON line per (sampled) request: what was decided, never what was said."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rlhf_gateway.assignment import Conversation


@dataclass(frozen=True)
class Record:
    """`arm` and `revision` were assigned; `served_by` is the revision whose answer the user got, if any."""

    time: float  # seconds since 1970
    generation: int
    stage: int
    arm: str
    revision: str
    served_by: str | None
    status: int | None
    fallback: str | None
    shadow: bool
    failed: bool
    violating: bool | None
    latency_ms: float | None


class Recorder:
    """Writes a sampled share of records. Safety hits and failures are always kept."""

    def __init__(self, rollout: str, share: float, write: Callable[[str], object], draw: random.Random) -> None:
        self._rollout = rollout
        self._share = share
        self._write = write
        self._draw = draw

    def write(self, record: Record, conversation: Conversation) -> None:
        """Write the record, or leave it to the sample. Conversations are named by hash: equal ones stay linkable."""
        if self._share <= 0:
            return
        always = record.failed or bool(record.violating)
        if not always and self._draw.random() >= self._share:
            return
        named = hashlib.sha256(f"{self._rollout}:{conversation.key}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        line = {
            "record": "request",
            "rollout": self._rollout,
            "conversation": named,
            "unit": conversation.unit,
            "sampling_probability": 1.0 if always else self._share,
            **asdict(record),
        }
        self._write(json.dumps(line))
