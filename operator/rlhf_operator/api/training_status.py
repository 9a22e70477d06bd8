"""The status that both job kinds share: phase, attempts, progress, evidence, usage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from rlhf_operator.api.meta import ApiStatus, Conditions, ListMap
from rlhf_trainer.wire import CheckpointRecord, GuardrailReport, SkippedCheckpoint, Verdict

MAX_ATTEMPTS_KEPT = 10
MAX_CHECKPOINTS_KEPT = 10


class JobPhase(StrEnum):
    PENDING = "Pending"
    QUEUED = "Queued"
    INITIALIZING = "Initializing"
    RUNNING = "Running"
    DEGRADED = "Degraded"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Usage(ApiStatus):
    """Seconds of wall time by what the pods did, and what that cost. lostSeconds is trained but not checkpointed."""

    queued_seconds: float = 0.0
    initializing_seconds: float = 0.0
    training_seconds: float = 0.0
    lost_seconds: float = 0.0
    gpu_seconds: float = 0.0
    cost_usd: float | None = Field(None, alias="costUSD")


class Attempt(ApiStatus):
    """One child Job; counters are derived from these entries, never incremented.

    Times mark when the operator learned of it; an eviction by Kueue folds them into `usage` and starts over.
    """

    number: int
    job_uid: str = ""
    pod_uids: Annotated[list[str], Field(max_length=64)] = Field(default_factory=list)
    started_at: AwareDatetime  # this entry was written; the Job is created after
    gpus: float | None = None  # that its pods hold: the spec may ask for others while they end
    cost_per_hour: float | None = None
    queued_at: AwareDatetime | None = None  # waits for quota and nodes since; default: startedAt
    admitted_at: AwareDatetime | None = None  # the Job was seen unsuspended
    scheduled_at: AwareDatetime | None = None  # the first pod has a node: accelerators are held from here on
    ready_at: AwareDatetime | None = None  # all pods were ready
    running_at: AwareDatetime | None = None  # the first report of a training step
    ended_at: AwareDatetime | None = None
    failed_at: AwareDatetime | None = None  # the earliest failure of a pod; the entry ends when all pods have
    stopping: Annotated[str, Field(max_length=64)] | None = None  # why the operator ends it
    failure_class: Annotated[str, Field(max_length=64)] | None = None
    reason: Annotated[str, Field(max_length=128)] | None = None
    message: Annotated[str, Field(max_length=1024)] | None = None
    exit_code: int | None = None
    counted: bool = False
    action: Literal["Complete", "Fail", "Restart", "Suspend"] | None = None  # what follows from its end
    released_by: Annotated[str, Field(max_length=253)] | None = None  # the Decision that lets a paused job go on
    resumed_from_step: int | None = None
    converted_from: int | None = None  # ranks that wrote that checkpoint, where there were others than now
    skipped_checkpoints: Annotated[list[SkippedCheckpoint], Field(max_length=5)] = Field(default_factory=list)
    step: int = 0
    usage: Usage = Usage()


class EvictedAttempts(ApiStatus):
    """Running totals of ledger entries that were dropped because the ledger is bounded."""

    count: int = 0
    restarts: int = 0
    counted: int = 0
    usage: Usage = Usage()


class Progress(ApiStatus):
    attempt: int
    phase: str
    step: int = 0
    total_steps: int = 0
    world_size: int = 0
    last_step_at: AwareDatetime | None = None
    expected_end_at: AwareDatetime | None = None  # of the last step, at the pace of the latest ones
    reported_at: AwareDatetime  # time of the report that was written here; at most one in 30 s


class ArtifactStatus(ApiStatus):
    uri: str
    digest: str


class WaiverStatus(ApiStatus):
    """A gate that a person answered for."""

    decision: str
    by: str
    digest: str


class TrainingJobStatus(ApiStatus):
    phase: JobPhase = JobPhase.PENDING
    conditions: Conditions = Field(default_factory=list)
    observed_generation: int = 0
    attempt: int = 0
    restarts: int = 0  # all of them; restartsCounted is held against maxRestarts
    restarts_counted: int = 0
    start_time: AwareDatetime | None = None
    completion_time: AwareDatetime | None = None
    attempts: Annotated[list[Attempt], ListMap(("number",)), Field(max_length=MAX_ATTEMPTS_KEPT)] = Field(
        default_factory=list
    )
    evicted_attempts: EvictedAttempts | None = None
    progress: Progress | None = None
    metrics: Annotated[dict[str, float], Field(max_length=64)] = Field(default_factory=dict)
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=MAX_CHECKPOINTS_KEPT)] = Field(default_factory=list)
    guardrails: Annotated[list[GuardrailReport], Field(max_length=16)] = Field(default_factory=list)
    artifact: ArtifactStatus | None = None
    lineage: Annotated[dict[str, str], Field(max_length=32)] = Field(default_factory=dict)
    verdicts: Annotated[list[Verdict], Field(max_length=32)] = Field(default_factory=list)
    waiver: WaiverStatus | None = None
    inputs: Annotated[dict[str, ArtifactStatus], Field(max_length=16)] = Field(default_factory=dict)  # as resolved
    usage: Usage = Usage()
    pod_template_digest: str | None = None
