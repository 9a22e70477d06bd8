"""The status of a PolicyRollout: phase, verdicts, weights and the ledger of revisions."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from rlhf_operator.api.meta import ApiStatus, Conditions, ListMap, PreserveUnknown
from rlhf_trainer.wire import VerdictState

MAX_STAGES = 20
MAX_REVISIONS_KEPT = 20


class RolloutMetric(StrEnum):
    """What is compared, per conversation."""

    SAFETY = "safetyViolationRate"
    AVAILABILITY = "availability"
    LATENCY = "latencyP95"


class RolloutPhase(StrEnum):
    PENDING = "Pending"
    SHADOWING = "Shadowing"
    PROGRESSING = "Progressing"
    AWAITING_APPROVAL = "AwaitingApproval"
    PAUSED = "Paused"
    PROMOTING = "Promoting"
    HEALTHY = "Healthy"
    ROLLING_BACK = "RollingBack"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"


class RolloutReason(StrEnum):
    FIRST_REVISION = "FirstRevision"
    NEED_MORE_SAMPLES = "NeedMoreSamples"
    STAGE_RUNNING = "StageRunning"
    AWAITING_DECISION = "AwaitingDecision"
    STAGE_PASSED = "StagePassed"
    GUARDRAIL_CROSSED = "GuardrailCrossed"
    CANDIDATE_UNAVAILABLE = "CandidateUnavailable"
    SPLIT_MISMATCH = "SplitMismatch"
    METRICS_BLIND = "MetricsBlind"
    DIGEST_REJECTED = "DigestRejected"
    ABORTED_BY_DECISION = "AbortedByDecision"
    SUPERSEDED = "Superseded"
    PROMOTED = "Promoted"
    # shared with the jobs
    WAITING_FOR_UPSTREAM = "WaitingForUpstream"
    INVALID_DATA = "InvalidData"
    DIGEST_MISMATCH = "DigestMismatch"


class RevisionState(StrEnum):
    """What a revision is to the rollout now."""

    CANDIDATE = "Candidate"
    STABLE = "Stable"
    RETAINED = "Retained"  # former stable, still loaded
    RETIRED = "Retired"
    REJECTED = "Rejected"
    SUPERSEDED = "Superseded"


class Interval(ApiStatus):
    lower: float
    upper: float


class RolloutVerdict(ApiStatus):
    """One guardrail's answer about the candidate, valid at any moment it is read."""

    metric: RolloutMetric
    state: VerdictState
    n: int  # candidate conversations it rests on
    candidate_rate: float | None = None
    stable_rate: float | None = None  # at the exposure of the candidate
    estimate: float | None = None  # difference of the two
    interval: Interval | None = None  # anytime-valid, each side at alpha
    margin: float
    e_value: float | None = None  # evidence that the candidate is worse; Fail at bound
    bound: float  # 1/alpha
    needed: int | None = None  # further candidate conversations until Pass, at the rates seen; absent: not reachable
    eta_seconds: int | None = None
    test: Annotated[str, Field(max_length=128)] = ""
    message: Annotated[str, Field(max_length=1024)] = ""


class Weights(ApiStatus):
    """Percent of conversations on the candidate: wished, in the gateway's configuration, and counted."""

    desired: float = 0.0
    written: float = 0.0
    observed: float | None = None


class Revision(ApiStatus):
    """One entry of the ledger."""

    revision: Annotated[str, Field(max_length=63)]  # short name, of its Deployment and Service
    digest: str
    uri: str
    state: RevisionState
    image: str = ""  # of the policy server: pinned, so that an operator upgrade reloads nothing
    trial: int = 0
    started_at: datetime
    available_at: datetime | None = None
    finished_at: datetime | None = None
    retained_until: datetime | None = None
    stage_reached: int | None = None
    reason: Annotated[str, Field(max_length=64)] | None = None
    message: Annotated[str, Field(max_length=1024)] | None = None
    approvals: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=2 * MAX_STAGES)] = Field(
        default_factory=list
    )
    verdicts: Annotated[list[RolloutVerdict], Field(max_length=8)] = Field(default_factory=list)  # as it ended
    cleared_by: Annotated[str, Field(max_length=256)] | None = None


class PolicyRolloutStatus(ApiStatus):
    phase: RolloutPhase = RolloutPhase.PENDING
    conditions: Conditions = Field(default_factory=list)
    observed_generation: int = 0
    stage: int | None = None  # index into spec.stages
    stage_started_at: datetime | None = None  # the gateways confirmed its weight
    stage_samples: int | None = None  # candidate conversations counted in this stage
    trial: int = 0  # grows with every candidate; a trial never reads another one's evidence
    trial_plan: str | None = None  # digest of stages and guardrails: an edit starts the trial again
    weights: Weights = Weights()
    generation: int = 0  # of the gateway's configuration
    family_wise_alpha: float | None = None  # bound on a wrong Fail of any guardrail in this trial
    verdicts: Annotated[list[RolloutVerdict], ListMap(("metric",)), Field(max_length=8)] = Field(default_factory=list)
    revisions: Annotated[list[Revision], Field(max_length=MAX_REVISIONS_KEPT)] = Field(default_factory=list)
    blind_since: datetime | None = None
    evidence: Annotated[dict[str, Any], PreserveUnknown()] = Field(
        default_factory=dict,
        description="State of the sequential tests and the gateway counters already folded into it; written together.",
    )
    endpoint: str | None = None  # where users of the policy send their requests
