"""The tracker of an attempt, by its configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from rlhf_trainer.config import Tracker as Choice
from rlhf_trainer.tracking.background import Background
from rlhf_trainer.tracking.base import Dataset, RunInfo, Tracker, flatten
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located, Result

_ADAPTERS = {
    Choice.TENSORBOARD: "rlhf_trainer.tracking.tensorboard:TensorBoardTracker",
    Choice.MLFLOW: "rlhf_trainer.tracking.mlflow:MLflowTracker",
    Choice.WANDB: "rlhf_trainer.tracking.wandb:WandbTracker",
}


def open_tracker(config: AttemptConfig, folder: Path) -> Background | None:
    """A started run that knows parameters and inputs; None where none is wanted. For rank 0 alone."""
    training = config.reward_model_training or config.policy_training
    if training is None or training.tracking.tracker is Choice.NONE:
        return None
    background = Background(
        lambda: _make(training.tracking.tracker), finish_seconds=min(10.0, config.grace_seconds / 4)
    )
    background.start(
        RunInfo(
            training.tracking.project,
            config.namespace,
            config.name,
            config.uid,
            config.attempt,
            config.kind,
            folder,
        )
    )
    params = flatten(training.model_dump(mode="json", by_alias=True))
    background.params({**params, "worldSize": str(config.world_size), "configDigest": config.config_digest})
    for name in AttemptConfig.model_fields:
        located = getattr(config, name)
        if isinstance(located, Located) and located.digest is not None:
            background.dataset(Dataset(name, located.uri or located.path, located.digest))
    return background


def close(tracker: Background | None, result: Result) -> None:
    """Tells how the attempt ended, with the figures and the artifact of its end."""
    if tracker is None:
        return
    if result.artifact is not None:
        tracker.metrics(result.step, result.metrics)
        tracker.artifact(result.artifact.path, result.artifact.digest)
    succeeded = result.failure_class is FailureClass.SUCCESS
    tracker.finish(succeeded, result.reason, result.message)


def _make(choice: Choice) -> Tracker:
    module, _, name = _ADAPTERS[choice].partition(":")
    maker: Callable[[], Tracker] = getattr(importlib.import_module(module), name)
    return maker()
