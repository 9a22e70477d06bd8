"""What a tracker is told, and by whom: one small protocol that every adapter implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class RunInfo:
    """One attempt. Attempts of a run share ``uid``, by which trackers group them."""

    project: str
    namespace: str
    name: str
    uid: str
    attempt: int
    kind: str
    folder: Path  # this attempt's, writable: for trackers that keep files

    @property
    def title(self) -> str:
        return f"{self.namespace}/{self.name}/a{self.attempt}"


@dataclass(frozen=True)
class Dataset:
    """An input by digest, not by content: preferences, prompts, a base model, ..."""

    name: str
    uri: str
    digest: str


class Tracker(Protocol):
    """One attempt in one tracker. Every method may raise and may be slow: ``Background`` keeps both from training.

    ``start`` comes first and may be called again after it failed; ``finish`` comes last.
    """

    def start(self, run: RunInfo) -> None: ...

    def params(self, values: Mapping[str, str]) -> None: ...

    def dataset(self, dataset: Dataset) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def artifact(self, path: str, digest: str) -> None:
        """The finished model, by reference: gigabytes stay on their volume."""
        ...

    def finish(self, succeeded: bool, reason: str, message: str) -> None: ...


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested configuration as dotted names and texts: ``{"kl": {"target": 6}}`` → ``{"kl.target": "6"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat
