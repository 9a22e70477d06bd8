"""Weights & Biases: online with WANDB_API_KEY, or files to sync later with WANDB_MODE=offline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from rlhf_trainer.tracking.base import Dataset, RunInfo

_INIT_SECONDS = 30.0


class WandbTracker:
    """One W&B run per attempt, grouped by the run's uid. Files go to the attempt's folder, caches to TMPDIR."""

    def __init__(self) -> None:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):  # a pod's root cannot be written
            os.environ.setdefault(name, tempfile.gettempdir())
        import wandb

        self._wandb = wandb
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        if self._run is not None:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_SECONDS,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,  # nodes have exporters of their own
        )
        self._run = self._wandb.init(
            project=run.project,
            name=run.title,
            group=run.uid,
            job_type=run.kind,
            dir=str(run.folder),
            settings=settings,
            reinit="create_new",
        )
        # Steps are a figure of their own: an evaluation may report for a step that has passed.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.config.update({"rlhf.uid": run.uid, "rlhf.attempt": run.attempt})

    def params(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def dataset(self, dataset: Dataset) -> None:
        self._run.config.update(
            {f"dataset.{dataset.name}": {"uri": dataset.uri, "digest": dataset.digest}}, allow_val_change=True
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def artifact(self, path: str, digest: str) -> None:
        self._run.summary["artifact.path"], self._run.summary["artifact.digest"] = path, digest

    def finish(self, succeeded: bool, reason: str, message: str) -> None:
        self._run.summary["reason"], self._run.summary["message"] = reason, message
        self._run.finish(exit_code=0 if succeeded else 1)
        # Its own process may still hold the last records. wandb waits for it when the interpreter shuts down in order,
        # which a worker does not.
        self._wandb.teardown()
