"""RewardModelJob: what tells it from another training job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.api.reward_model_job import RewardModelJobSpec
from rlhf_operator.kinds.base import Observed, Plan
from rlhf_operator.kinds.training import lifecycle
from rlhf_operator.kinds.training.job import JobKind
from rlhf_operator.kinds.training.reasons import Reason


def plan(observed: Observed) -> Plan:
    return lifecycle.plan(KIND, observed)


def _inputs(spec: RewardModelJobSpec) -> Mapping[str, Source | ArtifactSource]:
    found: dict[str, Source | ArtifactSource] = {"baseModel": spec.base_model, "preferences": spec.preferences}
    scores = spec.validation.human_scores
    if scores is not None:
        found["humanScores"] = Source.model_construct(uri=scores.uri, digest=scores.digest)
    return found


def _batch(spec: RewardModelJobSpec) -> tuple[str, int, int]:
    return "spec.training.globalBatchSize", spec.training.global_batch_size, 1


def _attempt_fields(spec: RewardModelJobSpec) -> Mapping[str, Any]:
    return {"rewardModelTraining": spec.training, "validation": spec.validation}


KIND: JobKind[RewardModelJobSpec] = JobKind(
    kind="RewardModelJob",
    infix="train",
    spec_model=RewardModelJobSpec,
    gate_reason=Reason.REWARD_GATE_FAILED,
    inputs=_inputs,
    batch=_batch,
    training=lambda spec: spec.training,
    attempt_fields=_attempt_fields,
    identity_inputs=("baseModel", "preferences"),
)
