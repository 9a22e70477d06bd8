"""What a user may say about optimising a policy."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from rlhf_trainer.config.base import DeepSpeed, Lora, Precision, Seed, Spec
from rlhf_trainer.config.offline import DPO, KTO, Distillation
from rlhf_trainer.config.running import Tracking


class KLPlacement(StrEnum):
    """reward: subtracted from the reward of each token; loss: a term of the loss."""

    REWARD = "reward"
    LOSS = "loss"


class KLEstimator(StrEnum):
    """k1 = log p - log q is right in the reward; in the loss only k2 = ½ (log p - log q)² and the importance-weighted
    k3 have the gradient of KL(p‖q)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class KLController(StrEnum):
    ADAPTIVE = "adaptive"
    FIXED = "fixed"


class KL(Spec):
    """The penalty that keeps the policy near the reference."""

    placement: KLPlacement = KLPlacement.REWARD
    estimator: KLEstimator = Field(KLEstimator.K1, description="k1 with placement reward; k2 or k3 with loss.")
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

    @model_validator(mode="after")
    def _valid_gradient(self) -> Self:
        if (self.placement is KLPlacement.REWARD) != (self.estimator is KLEstimator.K1):
            raise ValueError(
                f"estimator {self.estimator.value} has the wrong gradient with placement {self.placement.value}; "
                "use k1 in the reward, k2 or k3 in the loss"
            )
        return self


class GenerationEngine(StrEnum):
    """local: the built-in KV-cached loop; vllm: for trainer images that bring it, see docs/trainer-speed.md."""

    LOCAL = "local"
    VLLM = "vllm"


class Generation(Spec):
    """How responses are sampled during training."""

    engine: GenerationEngine = GenerationEngine.LOCAL
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = Field(20, description="Tokens of a response at most.")
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = Field(1.0, description="Of the softmax over next tokens.")


class Critic(StrEnum):
    """shared: a value head on the policy's trunk; separate: a model of its own, started from the policy."""

    SHARED = "shared"
    SEPARATE = "separate"


class PPO(Spec):
    """The clipped surrogate (Schulman et al. 2017; details of Huang et al. 2022) and its schedule, for every
    policy-gradient algorithm; the value fields are PPO's alone."""

    clip: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.2, description="Clip range of the probability ratio.")
    clip_high: Annotated[float, Field(gt=0.0, le=10.0)] | None = Field(
        None, description="Upper clip range where it differs (clip-higher, Yu et al. 2025)."
    )
    dual_clip: Annotated[float, Field(gt=1.0, le=100.0)] | None = Field(
        None, description="Bound of the ratio where the advantage is negative (Ye et al. 2020); none: unbounded."
    )
    target_kl: Annotated[float, Field(gt=0.0, le=100.0)] | None = Field(
        None, description="Mean per-token KL of a pass from the sampling policy that ends the step's passes early."
    )
    epochs: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Passes over each batch of rollouts.")
    mini_batches: Annotated[int, Field(ge=1, le=1024)] = Field(2, description="Optimiser steps per pass.")
    whiten_advantages: bool = Field(
        True,
        description="Advantages to mean 0 and variance 1 over the batch (PPO, ReinforcePlusPlus; GRPO has its scale).",
    )
    whiten_rewards: bool = Field(False, description="Scores divided by their deviation over the batch; mean kept.")
    critic: Critic = Critic.SHARED
    critic_warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="First steps in which only values are trained."
    )
    value_clip: Annotated[float, Field(gt=0.0, le=10.0)] = Field(0.2, description="Clip range of value predictions.")
    value_coefficient: Annotated[float, Field(ge=0.0, le=10.0)] = Field(0.1, description="Weight of the value loss.")
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = Field(1.0, description="Discount per token.")
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.95, description="lambda of generalised advantage estimation."
    )


class AdvantageScale(StrEnum):
    """group: by the deviation of a prompt's samples (GRPO); batch: of the whole batch; none: not (Dr. GRPO)."""

    GROUP = "group"
    BATCH = "batch"
    NONE = "none"


class LossNormalization(StrEnum):
    """token: every token of the batch weighs the same; sequence: every response; maxLength: tokens over
    generation.maxNewTokens, so that length carries no reward of its own (Dr. GRPO, Liu et al. 2025)."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    MAX_LENGTH = "maxLength"


class GRPO(Spec):
    """Group-relative advantages (Shao et al. 2024); scale none with lossNormalization maxLength is Dr. GRPO."""

    scale: AdvantageScale = AdvantageScale.GROUP


class Overlong(Spec):
    """Soft penalty for length (DAPO, Yu et al. 2025): from 0 at start to penalty at generation.maxNewTokens."""

    start: Annotated[int, Field(ge=1, le=131_072)] = Field(description="Response tokens up to which nothing is taken.")
    penalty: Annotated[float, Field(gt=0.0, le=100.0)] = Field(1.0, description="Taken off at the limit.")


class Cost(StrEnum):
    """safety: 1 for a reply that evaluation.safetyFilter refuses; length: response tokens; incomplete: 1 for a reply
    that does not end by itself."""

    SAFETY = "safety"
    LENGTH = "length"
    INCOMPLETE = "incomplete"


class Constraint(Spec):
    """The mean cost of responses must stay at or below limit: PPO-Lagrangian (Ray et al. 2019, Dai et al. 2023)."""

    cost: Cost
    limit: Annotated[float, Field(ge=0.0, le=1_000_000.0)] = Field(0.0, description="Mean cost per response, at most.")
    initial_multiplier: Annotated[float, Field(ge=0.0, le=1000.0)] = Field(1.0, description="lambda at the start.")
    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = Field(0.1, description="Of lambda.")
    max_multiplier: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        5.0, description="Cap of lambda; sitting at it is reported as an unsatisfied constraint."
    )
    window: Annotated[int, Field(ge=1, le=1_000_000)] = Field(128, description="Latest responses in the mean cost.")


class Algorithm(StrEnum):
    """Online, against spec.rewardModel: PPO, GRPO, RLOO, ReinforcePlusPlus, BestOfN. From spec.preferences: DPO, KTO.
    From spec.demonstrations: SFT. From spec.teacher: Distillation."""

    PPO = "PPO"
    GRPO = "GRPO"
    RLOO = "RLOO"
    REINFORCE_PLUS_PLUS = "ReinforcePlusPlus"
    BEST_OF_N = "BestOfN"
    DPO = "DPO"
    KTO = "KTO"
    SFT = "SFT"
    DISTILLATION = "Distillation"


ONLINE = frozenset({Algorithm.PPO, Algorithm.GRPO, Algorithm.RLOO, Algorithm.REINFORCE_PLUS_PLUS, Algorithm.BEST_OF_N})
GROUPED = frozenset({Algorithm.GRPO, Algorithm.RLOO, Algorithm.BEST_OF_N})
FROM_PREFERENCES = frozenset({Algorithm.DPO, Algorithm.KTO})


class PolicyTraining(Spec):
    """Optimising a policy: by reinforcement learning, from preferences, from demonstrations or from a teacher."""

    algorithm: Algorithm = Algorithm.PPO
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(120, description="Training steps.")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.001, description="Peak learning rate of AdamW.")
    prompts_per_step: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        64,
        description="Prompts (pairs, demonstrations) per step over all ranks; divisible by world size x "
        "ppo.miniBatches.",
    )
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Rollouts of each prompt; GRPO, RLOO and BestOfN need at least 2."
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Rows per rank and backward pass (gradient accumulation); by default what memory suggests."
    )
    max_prompt_length: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        16, description="Tokens of a prompt at most; longer ones are dropped and counted."
    )
    missing_eos_penalty: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        1.0, description="Subtracted from the reward of a response that does not end by itself."
    )
    overlong: Overlong | None = None
    reward_std_penalty: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        0.5, description="lambda in mean - lambda*std over the reward ensemble (Coste et al. 2023)."
    )
    loss_normalization: LossNormalization = LossNormalization.TOKEN
    kl: KL = KL()
    generation: Generation = Generation()
    ppo: PPO = PPO()
    grpo: GRPO = GRPO()
    dpo: DPO = DPO()
    kto: KTO = KTO()
    distillation: Distillation = Distillation()
    constraints: Annotated[list[Constraint], Field(max_length=3)] = Field(
        default_factory=list, description="Bounds on mean costs, held by Lagrange multipliers; one per cost."
    )
    lora: Lora | None = Field(None, description="Adapters instead of all weights; they are merged into the artifact.")
    precision: Precision = Precision.AUTO
    deepspeed: DeepSpeed = DeepSpeed()
    tracking: Tracking = Tracking()
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.algorithm in GROUPED and self.samples_per_prompt < 2:
            raise ValueError(f"{self.algorithm.value} compares samples of a prompt: set samplesPerPrompt to 2 or more")
        costs = [constraint.cost for constraint in self.constraints]
        if len(set(costs)) < len(costs):
            raise ValueError("constraints name a cost twice; keep one of them")
        if self.overlong is not None and self.overlong.start >= self.generation.max_new_tokens:
            raise ValueError(
                f"overlong.start {self.overlong.start} is not below generation.maxNewTokens "
                f"{self.generation.max_new_tokens}, so no response could be penalised"
            )
        return self
