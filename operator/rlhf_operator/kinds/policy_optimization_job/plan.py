"""PolicyOptimizationJob: what tells it from another training job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec
from rlhf_operator.kinds.base import Key, Object, Observed, Plan
from rlhf_operator.kinds.training import lifecycle, upstream
from rlhf_operator.kinds.training.job import JobKind
from rlhf_operator.kinds.training.reasons import Reason


def plan(observed: Observed) -> Plan:
    return lifecycle.plan(KIND, observed)


def references(primary: Object) -> frozenset[Key]:
    return upstream.references(primary, ("rewardModel", "auditRewardModel"))


def _inputs(spec: PolicyOptimizationJobSpec) -> Mapping[str, Source | ArtifactSource]:
    found: dict[str, Source | ArtifactSource] = {
        "policy": spec.policy,
        "rewardModel": spec.reward_model,
        "prompts": spec.prompts,
    }
    if spec.audit_reward_model is not None:
        found["auditRewardModel"] = spec.audit_reward_model
    judge = spec.evaluation.safety_filter
    if judge is not None:
        found["safetyFilter"] = Source.model_construct(uri=judge.uri, digest=judge.digest)
    return found


def _batch(spec: PolicyOptimizationJobSpec) -> tuple[str, int, int]:
    return "spec.training.promptsPerStep", spec.training.prompts_per_step, spec.training.ppo.mini_batches


def _attempt_fields(spec: PolicyOptimizationJobSpec) -> Mapping[str, Any]:
    return {"policyTraining": spec.training, "guardrails": tuple(spec.guardrails), "evaluation": spec.evaluation}


KIND: JobKind[PolicyOptimizationJobSpec] = JobKind(
    kind="PolicyOptimizationJob",
    infix="tune",
    spec_model=PolicyOptimizationJobSpec,
    gate_reason=Reason.EVALUATION_GATE_FAILED,
    inputs=_inputs,
    batch=_batch,
    training=lambda spec: spec.training,
    attempt_fields=_attempt_fields,
    identity_inputs=("policy", "rewardModel", "prompts"),
)
