"""RewardModelJob: preference data in, a validated reward model out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_operator.api.meta import ApiSpec, ArtifactSource, Cel, PreserveUnknown, Source
from rlhf_operator.api.object_store import SET_ONCE, read_by
from rlhf_operator.api.training import TRAINING_JOB_RULES, TrainingJobSpec, immutable
from rlhf_operator.api.training_status import TrainingJobStatus
from rlhf_trainer.config import RewardModelTraining, RewardModelValidation


class RewardModelJobSpec(TrainingJobSpec):
    base_model: ArtifactSource = Field(
        description="A causal language model, whose trunk the reward model starts from; its tokenizer must be that of "
        "the policies it will judge. Of a PolicyOptimizationJob (SFT, say), once that is Validated, or pinned."
    )
    preferences: Source
    training: RewardModelTraining = RewardModelTraining()
    validation: RewardModelValidation = RewardModelValidation()

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "type(self.trainer.numProcPerNode) != int"
            " || self.training.globalBatchSize % (self.trainer.numNodes * int(self.trainer.numProcPerNode)) == 0",
            "training.globalBatchSize must be divisible by trainer.numNodes x trainer.numProcPerNode",
        ),
        Cel(
            "!has(self.validation.maxLengthBias) || has(self.validation.humanScores)",
            "validation.maxLengthBias compares with trusted scores, without which its gate cannot pass: "
            "name validation.humanScores, or remove it",
            field_path=".validation.maxLengthBias",
        ),
        Cel(
            "!has(self.training.aspects) || self.training.aspects.all(a, self.training.aspects.exists_one(b, b == a))",
            "training.aspects name an aspect twice: keep one of them",
            field_path=".training.aspects",
        ),
        SET_ONCE,
        read_by("baseModel", "preferences", "validation.humanScores"),
    )


class RewardModelJobStatus(TrainingJobStatus):
    """Status of a RewardModelJob."""


class RewardModelJob(ApiSpec):
    """Trains a scalar reward model on preference pairs and lets it pass only on held-out evidence."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["RewardModelJob"] = "RewardModelJob"
    metadata: Annotated[dict[str, Any], PreserveUnknown()] = Field(default_factory=dict)
    spec: RewardModelJobSpec
    status: RewardModelJobStatus | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        *TRAINING_JOB_RULES,
        immutable("baseModel"),
        immutable("preferences"),
        immutable("training"),
        immutable("validation"),
    )
