"""PolicyOptimizationJob: what tells it from another training job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec
from rlhf_operator.kinds.base import Observed, Plan
from rlhf_operator.kinds.training import lifecycle
from rlhf_operator.kinds.training.job import JobKind
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_trainer.config import ONLINE, SafetyFilterSource, SafetySuite


def plan(observed: Observed) -> Plan:
    return lifecycle.plan(KIND, observed)


def _inputs(spec: PolicyOptimizationJobSpec) -> Mapping[str, Source | ArtifactSource]:
    named: dict[str, Source | ArtifactSource | None] = {
        "policy": spec.policy,
        "rewardModel": spec.reward_model,
        "preferences": spec.preferences,
        "demonstrations": spec.demonstrations,
        "teacher": spec.teacher,
        "prompts": spec.prompts,
        "auditRewardModel": spec.audit_reward_model,
        "safetyFilter": _source(spec.evaluation.safety_filter),
        "safetySuite": _source(spec.evaluation.safety_suite),
    }
    return {name: source for name, source in named.items() if source is not None}


def _source(pinned: SafetyFilterSource | SafetySuite | None) -> Source | None:
    return None if pinned is None else Source.model_construct(uri=pinned.uri, digest=pinned.digest)


def _batch(spec: PolicyOptimizationJobSpec) -> tuple[str, int, int]:
    mini_batches = spec.training.ppo.mini_batches if spec.training.algorithm in ONLINE else 1
    return "spec.training.promptsPerStep", spec.training.prompts_per_step, mini_batches


def _attempt_fields(spec: PolicyOptimizationJobSpec) -> Mapping[str, Any]:
    return {"policyTraining": spec.training, "guardrails": tuple(spec.guardrails), "evaluation": spec.evaluation}


def _unjudged(spec: PolicyOptimizationJobSpec) -> str:
    if spec.reward_model or spec.audit_reward_model or spec.evaluation.safety_filter:
        return ""
    return (
        "nothing judges this policy: neither auditRewardModel nor evaluation.safetyFilter is named; "
        "another job that names one can be Validated, and this artifact be used by its uri and digest"
    )


KIND: JobKind[PolicyOptimizationJobSpec] = JobKind(
    kind="PolicyOptimizationJob",
    infix="tune",
    spec_model=PolicyOptimizationJobSpec,
    gate_reason=Reason.EVALUATION_GATE_FAILED,
    inputs=_inputs,
    batch=_batch,
    training=lambda spec: spec.training,
    attempt_fields=_attempt_fields,
    # The safety filter is among them because a safety constraint learns from it.
    identity_inputs=("policy", "rewardModel", "preferences", "demonstrations", "teacher", "prompts", "safetyFilter"),
    unjudged=_unjudged,
)
