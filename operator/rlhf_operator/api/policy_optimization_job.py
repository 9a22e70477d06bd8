"""PolicyOptimizationJob: a base policy and a validated reward model in, an evaluated policy out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_operator.api.meta import ApiSpec, ArtifactSource, Cel, PreserveUnknown, Source
from rlhf_operator.api.training import TRAINING_JOB_RULES, TrainingJobSpec, TrainingJobStatus, immutable
from rlhf_trainer.config import Evaluation, PolicyTraining, TrainingGuardrail


class PolicyOptimizationJobSpec(TrainingJobSpec):
    policy: Source
    reward_model: ArtifactSource
    audit_reward_model: ArtifactSource | None = Field(
        None, description="Scores the policy but never trains it; refused when it is the training reward model."
    )
    prompts: Source
    training: PolicyTraining = PolicyTraining()
    guardrails: Annotated[list[TrainingGuardrail], Field(max_length=16)] = Field(
        default_factory=list, description="Bounds on training metrics, judged at every step."
    )
    evaluation: Evaluation = Evaluation()

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "type(self.trainer.numProcPerNode) != int || self.training.promptsPerStep"
            " % (self.trainer.numNodes * int(self.trainer.numProcPerNode) * self.training.ppo.miniBatches) == 0",
            "training.promptsPerStep must be divisible by trainer.numNodes x trainer.numProcPerNode x "
            "training.ppo.miniBatches",
        ),
        Cel(
            "!has(self.auditRewardModel) || ("
            "!(has(self.auditRewardModel.digest) && has(self.rewardModel.digest)"
            " && self.auditRewardModel.digest == self.rewardModel.digest)"
            " && !(has(self.auditRewardModel.jobRef) && has(self.rewardModel.jobRef)"
            " && self.auditRewardModel.jobRef.name == self.rewardModel.jobRef.name))",
            "auditRewardModel must not be rewardModel: an audit by the model that trained the policy shows nothing",
        ),
        Cel(
            "!has(self.guardrails) || self.guardrails.all(g, (has(g.above) || has(g.below))"
            " && (!has(g.above) || !has(g.below) || g.below < g.above))",
            "a guardrail needs above, below or both, and below must be less than above",
        ),
    )


class PolicyOptimizationJobStatus(TrainingJobStatus):
    """Status of a PolicyOptimizationJob."""


class PolicyOptimizationJob(ApiSpec):
    """Tunes a policy against a reward model by reinforcement learning and evaluates it against its base."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["PolicyOptimizationJob"] = "PolicyOptimizationJob"
    metadata: Annotated[dict[str, Any], PreserveUnknown()] = Field(default_factory=dict)
    spec: PolicyOptimizationJobSpec
    status: PolicyOptimizationJobStatus | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        *TRAINING_JOB_RULES,
        immutable("policy"),
        immutable("rewardModel"),
        immutable("auditRewardModel", optional=True),
        immutable("prompts"),
        immutable("training"),
        immutable("guardrails", optional=True),
        immutable("evaluation"),
    )
