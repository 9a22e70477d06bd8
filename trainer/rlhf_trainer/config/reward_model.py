"""What a user may say about training and judging a reward model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rlhf_trainer.config.base import DeepSpeed, Fraction, Lora, PinnedDigest, PinnedUri, Precision, Seed, Spec
from rlhf_trainer.config.running import Tracking


class Calibration(StrEnum):
    TEMPERATURE = "temperature"
    NONE = "none"


class Ensemble(Spec):
    """K reward heads trained on bootstrap rows; their spread says where the reward model guesses."""

    members: Annotated[int, Field(ge=1, le=16)] = Field(3, description="Number of ensemble members K.")


class RewardModelTraining(Spec):
    """Bradley-Terry training of a reward model on preference pairs."""

    epochs: Annotated[int, Field(ge=1, le=100)] = Field(2, description="Passes over the training pairs.")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.001, description="Peak learning rate of AdamW.")
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        64, description="Pairs per optimiser step over all ranks; must be divisible by the world size."
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Pairs per rank and backward pass (gradient accumulation); by default what memory suggests."
    )
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        64,
        description="Tokens of prompt plus response; longer pairs are dropped and counted, never truncated.",
    )
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="Decoupled weight decay of AdamW.")
    centering: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        0.01,
        description="Coefficient of the squared reward sum that keeps scores centred (Eisenstein et al. 2023).",
    )
    margin: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        0.0,
        description="Reward margin asked per unit of the annotation's strength (Touvron et al. 2023); 0 ignores it.",
    )
    aspects: Annotated[
        list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=64)]], Field(max_length=16)
    ] = Field(
        default_factory=list,
        description="Aspects of the annotations (helpfulness, ...) that get a head each, trained on the pairs they "
        "order; the reward stays the overall head.",
    )
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Share of prompts (not rows) held out for validation and calibration."
    )
    ensemble: Ensemble = Ensemble()
    calibration: Calibration = Field(
        Calibration.TEMPERATURE, description="temperature: one scale fitted on held-out pairs; none: raw scores."
    )
    lora: Lora | None = Field(None, description="Adapters instead of all weights; they are merged into the artifact.")
    precision: Precision = Precision.AUTO
    deepspeed: DeepSpeed = DeepSpeed()
    tracking: Tracking = Tracking()
    seed: Seed = 0


class HumanScores(Spec):
    """Trusted scalar scores of single responses: the check that careless labels cannot pass."""

    uri: PinnedUri
    digest: PinnedDigest
    min_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = Field(
        0.6, description="Lower 95% bounds of the Spearman and of the Pearson correlation must reach this."
    )


class RewardModelValidation(Spec):
    """The gate of a reward model: each verdict is decided on confidence bounds."""

    min_accuracy: Fraction = Field(0.65, description="Lower 95% bound of held-out pairwise accuracy must reach this.")
    max_calibration_error: Fraction = Field(
        0.10, description="Expected calibration error (10 equal-mass bins) must stay below."
    )
    max_brier_score: Fraction | None = Field(
        None,
        description="Upper 95% bound of the mean squared error of predictions must stay below; a coin has 0.25.",
    )
    max_length_bias: Fraction | None = Field(
        None,
        description="Upper 95% bound of |Spearman correlation| of reward and length, beyond that of the trusted "
        "scores, must stay below.",
    )
    max_cohort_gap: Fraction | None = Field(
        None, description="Upper 95% bound of the accuracy gap between any cohort and the rest must stay below."
    )
    min_probe_pass_rate: Fraction | None = Field(
        None,
        description="For each kind of probe (keyword stuffing, truncation, wrong topic, empty) the lower 95% bound of "
        "the share on which the held-out favourite keeps the higher reward must reach this.",
    )
    min_aspect_accuracy: Fraction = Field(
        0.5, description="Lower 95% bound of held-out accuracy of every aspect's head: better than a coin."
    )
    human_scores: HumanScores | None = None
