"""PolicyOptimizationJob: a base policy and what it learns from in, an evaluated policy out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_operator.api.meta import ApiSpec, ArtifactSource, Cel, PreserveUnknown, Source
from rlhf_operator.api.object_store import SET_ONCE, read_by
from rlhf_operator.api.policy_rules import RULES, broken, one_of
from rlhf_operator.api.training import TRAINING_JOB_RULES, TrainingJobSpec, immutable
from rlhf_operator.api.training_status import TrainingJobStatus
from rlhf_trainer.config import ONLINE, Evaluation, PolicyTraining, TrainingGuardrail


class PolicyOptimizationJobSpec(TrainingJobSpec):
    policy: ArtifactSource = Field(
        description="The base policy: where training starts, and the reference it is held near. Of a "
        "PolicyOptimizationJob (SFT, say), once that is Validated, or pinned."
    )
    reward_model: ArtifactSource | None = Field(
        None, description="What PPO, GRPO, RLOO, ReinforcePlusPlus and BestOfN train against."
    )
    preferences: Source | None = Field(
        None, description="Annotated pairs: DPO compares their responses, KTO takes each of them as good or bad."
    )
    demonstrations: Source | None = Field(None, description="Prompts with the responses to imitate (SFT).")
    teacher: ArtifactSource | None = Field(
        None,
        description="The policy to learn from (Distillation): of a PolicyOptimizationJob, once that is Validated, or "
        "pinned.",
    )
    audit_reward_model: ArtifactSource | None = Field(
        None,
        description="Judges the policy but never trains it; refused when it shares weights or preferences with what "
        "does. Without one the win rate is judged by rewardModel, or, where there is none, not at all.",
    )
    prompts: Source = Field(
        description="Prompts to train on; about a fifth is held out by a hash of the text, and the policy is judged on "
        "these. DPO, KTO and SFT use them for judging alone."
    )
    training: PolicyTraining = PolicyTraining()
    guardrails: Annotated[list[TrainingGuardrail], Field(max_length=16)] = Field(
        default_factory=list, description="Bounds on training metrics, judged at every step."
    )
    evaluation: Evaluation = Evaluation()

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        *(rule.to_cel() for rule in RULES),
        Cel(
            "type(self.trainer.numProcPerNode) != int || self.training.promptsPerStep"
            " % (self.trainer.numNodes * int(self.trainer.numProcPerNode)"
            f" * ({one_of(ONLINE)} ? self.training.ppo.miniBatches : 1)) == 0",
            "training.promptsPerStep must be divisible by trainer.numNodes x trainer.numProcPerNode, and online by "
            "that x training.ppo.miniBatches; the samples of a prompt stay together",
        ),
        Cel(
            "!has(self.auditRewardModel) || !has(self.rewardModel) || ("
            "!(has(self.auditRewardModel.digest) && has(self.rewardModel.digest)"
            " && self.auditRewardModel.digest == self.rewardModel.digest)"
            " && !(has(self.auditRewardModel.jobRef) && has(self.rewardModel.jobRef)"
            " && self.auditRewardModel.jobRef.name == self.rewardModel.jobRef.name))",
            "auditRewardModel must not be rewardModel: an audit by the model that trained the policy shows nothing",
        ),
        SET_ONCE,
        read_by(
            *("policy", "rewardModel", "preferences", "demonstrations", "teacher", "auditRewardModel", "prompts"),
            *("evaluation.safetyFilter", "evaluation.safetySuite"),
        ),
    )

    @model_validator(mode="after")
    def _ruled(self) -> Self:
        """The API server has checked the same, unless its CRDs are older than this operator."""
        if message := broken(self):
            raise ValueError(message)
        return self


class PolicyOptimizationJobStatus(TrainingJobStatus):
    """Status of a PolicyOptimizationJob."""


class PolicyOptimizationJob(ApiSpec):
    """Tunes a policy by reinforcement learning against a reward model, from preferences, from demonstrations or from a
    teacher, and evaluates it."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["PolicyOptimizationJob"] = "PolicyOptimizationJob"
    metadata: Annotated[dict[str, Any], PreserveUnknown()] = Field(default_factory=dict)
    spec: PolicyOptimizationJobSpec
    status: PolicyOptimizationJobStatus | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        *TRAINING_JOB_RULES,
        Cel(
            "!has(self.spec.policy.jobRef) || self.spec.policy.jobRef.name != self.metadata.name",
            "spec.policy is this job itself, which would wait for ever: name another PolicyOptimizationJob",
            field_path=".spec.policy",
        ),
        Cel(
            "!has(self.spec.teacher) || !has(self.spec.teacher.jobRef)"
            " || self.spec.teacher.jobRef.name != self.metadata.name",
            "spec.teacher is this job itself, which would wait for ever: name another PolicyOptimizationJob",
            field_path=".spec.teacher",
        ),
        immutable("policy"),
        immutable("rewardModel", optional=True),
        immutable("preferences", optional=True),
        immutable("demonstrations", optional=True),
        immutable("teacher", optional=True),
        immutable("auditRewardModel", optional=True),
        immutable("prompts"),
        immutable("training"),
        immutable("guardrails", optional=True),
        immutable("evaluation"),
    )
