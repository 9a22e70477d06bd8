"""TensorBoard: event files in the attempt's folder."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_trainer.tracking.base import Dataset, RunInfo


class TensorBoardTracker:
    """Scalars by step; everything else as texts. Files go to ``<attempt>/tensorboard/<project>``."""

    def __init__(self) -> None:
        # The writer of the tensorboard package itself; torch's would import all of torch.utils for a thin wrapper.
        load: Callable[[str], Any] = importlib.import_module
        self._event = load("tensorboard.compat.proto.event_pb2")
        self._summary = load("tensorboard.compat.proto.summary_pb2")
        self._text_pb = load("tensorboard.plugins.text.summary_v2").text_pb
        self._open = load("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        folder = run.folder / "tensorboard" / safe_folder(run.project)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = self._open(str(folder))
        self._text("run", f"{run.kind} {run.title}, uid {run.uid}")

    def params(self, values: Mapping[str, str]) -> None:
        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        self._text("params", f"| Parameter | Value |\n|---|---|\n{rows}")

    def dataset(self, dataset: Dataset) -> None:
        self._text(f"dataset/{dataset.name}", f"{dataset.uri} {dataset.digest}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self._summary.Summary(value=scalars), step)

    def artifact(self, path: str, digest: str) -> None:
        self._text("artifact", f"{path} {digest}")

    def finish(self, succeeded: bool, reason: str, message: str) -> None:
        self._text("end", f"{'succeeded' if succeeded else 'failed'}: {reason}: {message}")
        self._writer.close()

    def _text(self, tag: str, text: str) -> None:
        self._write(self._text_pb(tag, text), 0)

    def _write(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def safe_folder(name: str) -> str:
    """A project's name as one folder that cannot lead elsewhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "_"
