"""What a user may say about training: embedded verbatim in the CRDs, so there is one source of truth.

No torch here. Every model forbids unknown fields; every list and string is bounded, so that the API server
can estimate the cost of the CEL rules. Numbers are JSON numbers; YAML reads ``1e-3`` as a string, so floats
also accept a numeric string (pydantic does this in its default mode).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Spec(BaseModel):
    """Base of everything a user writes: camelCase on the wire, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_enum_values=False
    )


PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class DeepSpeed(Spec):
    """The sharding of the one DeepSpeed engine."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="ZeRO stage: 0 (none) to 3 (parameters too).")


class Calibration(StrEnum):
    TEMPERATURE = "temperature"
    NONE = "none"


class Ensemble(Spec):
    """K reward heads trained on bootstrap rows; their spread says where the reward model guesses."""

    members: Annotated[int, Field(ge=1, le=16)] = Field(3, description="Number of ensemble members K.")


class RewardModelTraining(Spec):
    """Bradley-Terry training of a scalar reward model on preference pairs."""

    epochs: Annotated[int, Field(ge=1, le=100)] = Field(2, description="Passes over the training pairs.")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.001, description="Peak learning rate of AdamW.")
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        64, description="Pairs per optimiser step over all ranks; must be divisible by the world size."
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
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Share of prompts (not rows) held out for validation and calibration."
    )
    ensemble: Ensemble = Ensemble()
    calibration: Calibration = Field(
        Calibration.TEMPERATURE, description="temperature: one scale fitted on held-out pairs; none: raw scores."
    )
    deepspeed: DeepSpeed = DeepSpeed()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0, description="Of all randomness; the same seed, world size and inputs give the same artifact."
    )


class KLController(StrEnum):
    ADAPTIVE = "adaptive"
    FIXED = "fixed"


class KL(Spec):
    """The penalty that keeps the policy near the reference; it is part of the per-token reward (k1 estimator)."""

    placement: Literal["reward"] = Field("reward", description="reward: subtracted from the reward of each token.")
    coefficient: Annotated[float, Field(ge=0.0, le=100.0)] = Field(0.05, description="Initial weight of the penalty.")
    controller: KLController = Field(
        KLController.ADAPTIVE, description="adaptive: the coefficient follows target; fixed: it stays."
    )
    target: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        6.0, description="Sequence KL in nats the controller aims at."
    )
    horizon: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        2000, description="Samples over which the adaptive controller corrects (Ziegler et al. 2019)."
    )


class Generation(Spec):
    """How responses are sampled during training."""

    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = Field(20, description="Tokens of a response at most.")
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = Field(1.0, description="Of the softmax over next tokens.")


class PPO(Spec):
    """Schulman et al. 2017, with the details of Huang et al. 2022/2024."""

    clip: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.2, description="Clip range of the probability ratio.")
    value_clip: Annotated[float, Field(gt=0.0, le=10.0)] = Field(0.2, description="Clip range of value predictions.")
    value_coefficient: Annotated[float, Field(ge=0.0, le=10.0)] = Field(0.1, description="Weight of the value loss.")
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = Field(1.0, description="Discount per token.")
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.95, description="lambda of generalised advantage estimation."
    )
    epochs: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Passes over each batch of rollouts.")
    mini_batches: Annotated[int, Field(ge=1, le=1024)] = Field(2, description="Optimiser steps per pass.")


class Algorithm(StrEnum):
    """PPO: proximal policy optimisation with a value head."""

    PPO = "PPO"


class PolicyTraining(Spec):
    """Reinforcement learning of a policy against a reward model."""

    algorithm: Algorithm = Algorithm.PPO
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        120, description="Training steps: generate, score, optimise."
    )
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.001, description="Peak learning rate of AdamW.")
    prompts_per_step: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        64,
        description="Prompts, one rollout each, per step over all ranks; divisible by world size x ppo.miniBatches.",
    )
    max_prompt_length: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        16, description="Tokens of a prompt at most; longer ones are dropped and counted."
    )
    missing_eos_penalty: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        1.0, description="Subtracted from the reward of a response that does not end by itself."
    )
    reward_std_penalty: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        0.5, description="lambda in mean - lambda*std over the reward ensemble (Coste et al. 2023)."
    )
    kl: KL = KL()
    generation: Generation = Generation()
    ppo: PPO = PPO()
    deepspeed: DeepSpeed = DeepSpeed()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0, description="Of all randomness; the same seed, world size and inputs give the same artifact."
    )


class Checkpoints(Spec):
    """Complete training states; a restarted attempt goes on from the newest one that verifies."""

    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(50, description="Steps between two checkpoints.")
    keep_last: Annotated[int, Field(ge=1, le=100)] = Field(3, description="Verified checkpoints kept per run.")


class GuardrailMetric(StrEnum):
    """What is watched, as a mean over a step."""

    KL = "kl"
    REWARD = "reward"
    RESPONSE_LENGTH = "responseLength"
    CLIPPED_FRACTION = "clippedFraction"


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


PVC_URI = r"^pvc://[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$"
PinnedUri = Annotated[str, Field(pattern=PVC_URI, max_length=512, description="pvc://<claim>/<path>")]
PinnedDigest = Annotated[
    str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="sha256:<64 hex digits>")
]


class HumanScores(Spec):
    """Trusted scalar scores of single responses: the check that careless labels cannot pass."""

    uri: PinnedUri
    digest: PinnedDigest
    min_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = Field(
        0.6, description="Lower confidence bound of the Spearman correlation must reach this."
    )


class RewardModelValidation(Spec):
    """The gate of a reward model: each verdict is decided on confidence bounds."""

    min_accuracy: Fraction = Field(0.65, description="Lower 95% bound of held-out pairwise accuracy must reach this.")
    max_calibration_error: Fraction = Field(
        0.10, description="Expected calibration error (10 equal-mass bins) must stay below."
    )
    human_scores: HumanScores | None = None


class SafetyFilterSource(Spec):
    """A trained safety filter, one file; the digest is its fileDigest."""

    uri: PinnedUri
    digest: PinnedDigest


class Evaluation(Spec):
    """The gate of a policy, before any traffic."""

    against: Literal["policy"] = Field("policy", description="The opponent: the base policy the run started from.")
    min_win_rate: Fraction = Field(0.55, description="Lower 95% bound of the win rate must reach this.")
    max_violation_rate: Fraction = Field(
        0.05, description="Upper exact 95% bound of the safety violation rate must stay below."
    )
    safety_filter: SafetyFilterSource | None = Field(
        None, description="Judges violations; without one maxViolationRate is not judged and no verdict is given."
    )
    samples: Annotated[int, Field(ge=16, le=100_000)] = Field(400, description="Prompts judged.")
