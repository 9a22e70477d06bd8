"""How a run is kept, watched and tracked, whatever it trains."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rlhf_trainer.config.base import Spec


class Checkpoints(Spec):
    """Complete training states; a restarted attempt goes on from the newest one that verifies."""

    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(50, description="Steps between two checkpoints.")
    keep_last: Annotated[int, Field(ge=1, le=100)] = Field(3, description="Verified checkpoints kept per run.")


class GuardrailMetric(StrEnum):
    """What is watched, as a mean over a step."""

    KL = "kl"
    REWARD = "reward"
    REWARD_STD = "rewardStd"
    ZERO_VARIANCE_FRACTION = "zeroVarianceFraction"
    ENTROPY = "entropy"
    GRADIENT_NORM = "gradientNorm"
    RESPONSE_LENGTH = "responseLength"
    CLIPPED_FRACTION = "clippedFraction"
    CHOSEN_REWARD = "chosenReward"
    REWARD_MARGIN = "rewardMargin"


class GuardrailAction(StrEnum):
    """Alert reports; Pause saves a checkpoint and exits for the operator to suspend the job; Stop fails it."""

    ALERT = "Alert"
    PAUSE = "Pause"
    STOP = "Stop"


class TrainingGuardrail(Spec):
    """Judged in the trainer at every step, so nothing between two polls is missed."""

    metric: GuardrailMetric
    above: float | None = Field(None, description="Breached above this.")
    below: float | None = Field(None, description="Breached below this.")
    for_steps: Annotated[int, Field(ge=1, le=100_000)] = Field(
        5, description="Consecutive steps before the action (hysteresis)."
    )
    action: GuardrailAction = GuardrailAction.ALERT


class Tracker(StrEnum):
    """tensorboard writes beside the checkpoints; mlflow and wandb find their server in their usual variables."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


class Tracking(Spec):
    """Where figures go besides status and Prometheus. Rank 0 reports; a dead tracker never fails training."""

    tracker: Tracker = Tracker.NONE
    project: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        "rlhf", description="Experiment (MLflow), project (Weights & Biases) or folder (TensorBoard) of the run."
    )
