"""What crosses the wire between the operator and a training pod. No torch, no I/O.

    operator --AttemptConfig (ConfigMap, /etc/rlhf/attempt.json)--> pod
    pod      --StatusReport (GET /status on rank 0, port 8080)----> operator
    pod      --Result (termination message of every pod, result.json of rank 0)--> operator

Readers ignore unknown fields (version skew between operator and trainer images), writers send only known ones.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from rlhf_trainer.config import (
    Checkpoints,
    Evaluation,
    PolicyTraining,
    RewardModelTraining,
    RewardModelValidation,
    TrainingGuardrail,
)

ATTEMPT_CONFIG_PATH = "/etc/rlhf/attempt.json"
STATUS_PORT = 8080
RENDEZVOUS_PORT = 29500
TERMINATION_MESSAGE_LIMIT = 4096  # bytes; the kubelet cuts what is longer


class Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


def _in_utc(time: datetime) -> datetime:
    """The API server refuses a time without a zone, and with it the whole status that holds it."""
    try:
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError("a time at the end of the calendar") from error


Moment = Annotated[datetime, AfterValidator(_in_utc)]


class ExitCode(IntEnum):
    """The launcher's exit codes (docs/design.md, "Ends")."""

    SUCCESS = 0
    GATE_FAILED = 10
    INVALID = 11
    DIVERGED = 12
    GUARDRAIL_STOPPED = 13
    GUARDRAIL_PAUSED = 14
    PREEMPTED = 20
    RENDEZVOUS = 21
    NO_PROGRESS = 22
    UNKNOWN = 1


class FailureClass(StrEnum):
    """What an attempt ended as; restart behaviour hangs on this alone."""

    SUCCESS = "Success"
    GATE_FAILED = "GateFailed"
    INVALID = "Invalid"
    DIVERGED = "Diverged"
    GUARDRAIL_STOPPED = "GuardrailStopped"
    GUARDRAIL_PAUSED = "GuardrailPaused"
    PREEMPTED = "Preempted"
    RENDEZVOUS = "Rendezvous"
    NO_PROGRESS = "NoProgress"
    OUT_OF_MEMORY = "OutOfMemory"
    INFRASTRUCTURE = "Infrastructure"
    UNKNOWN = "Unknown"


class Located(Wire):
    """A file or folder as the pod sees it, and what it must hash to (None: not pinned)."""

    path: str
    digest: str | None = None
    uri: str | None = None  # what the user wrote, for messages and lineage


class AttemptConfig(Wire):
    """Everything one attempt needs, resolved: nothing mutable is read again after this is written."""

    kind: Literal["RewardModelJob", "PolicyOptimizationJob"]
    namespace: str
    name: str
    uid: str
    attempt: int
    world_size: int
    config_digest: str  # of data, model, training: equal for every attempt of a run; resume only on match
    output: Located  # folder <output.uri>/<uid>; the attempt writes only to <output>/a<attempt>/
    checkpoints: Checkpoints
    no_progress_seconds: int = 600
    rendezvous_seconds: int = 300
    grace_seconds: int = 30  # the pods' terminationGracePeriodSeconds: how long SIGTERM leaves for a checkpoint
    preferences: Located | None = None  # of a reward model, or of DPO and KTO
    # RewardModelJob
    base_model: Located | None = None
    human_scores: Located | None = None
    reward_model_training: RewardModelTraining | None = None
    validation: RewardModelValidation | None = None
    # PolicyOptimizationJob
    policy: Located | None = None
    reward_model: Located | None = None
    audit_reward_model: Located | None = None
    safety_filter: Located | None = None  # of evaluation.safetyFilter
    safety_suite: Located | None = None  # of evaluation.safetySuite
    prompts: Located | None = None
    demonstrations: Located | None = None  # of SFT
    teacher: Located | None = None  # of Distillation
    policy_training: PolicyTraining | None = None
    guardrails: tuple[TrainingGuardrail, ...] = ()
    evaluation: Evaluation | None = None


class VerdictState(StrEnum):
    PASS = "Pass"
    FAIL = "Fail"
    NEED_MORE_DATA = "NeedMoreData"
    UNKNOWN = "Unknown"


class Verdict(Wire):
    """One gate's answer: decided on the interval, never on the estimate alone."""

    metric: str
    state: VerdictState
    n: int
    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None
    needed: int | None = None  # further samples before a decision is possible
    message: str = ""


class CheckpointRecord(Wire):
    step: int
    attempt: int
    path: str
    digest: str
    time: Moment
    converted_from: int | None = None  # ranks that wrote it, where a resume converted it for another number


class SkippedCheckpoint(Wire):
    path: str
    step: int
    reason: str


class GuardrailReport(Wire):
    metric: str
    state: Literal["Healthy", "Breached"]
    value: float
    since_step: int
    action: str
    message: str = ""


class ReportPhase(StrEnum):
    INITIALIZING = "Initializing"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    DONE = "Done"


class StatusReport(Wire):
    """GET /status of rank 0. The operator checks attempt and worldSize before it believes anything else."""

    attempt: int
    uid: str
    world_size: int
    phase: ReportPhase
    step: int = 0
    total_steps: int = 0
    started_at: Moment
    updated_at: Moment
    last_step_at: Moment | None = None
    expected_end_at: Moment | None = None  # of the last step, at the present pace
    metrics: dict[str, float] = {}
    checkpoints: tuple[CheckpointRecord, ...] = ()
    resumed_from: CheckpointRecord | None = None
    skipped_checkpoints: tuple[SkippedCheckpoint, ...] = ()
    guardrails: tuple[GuardrailReport, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


class Artifact(Wire):
    path: str
    digest: str


class Result(Wire):
    """How an attempt ended. `result.json` is whole; the termination message is `compact()`."""

    failure_class: FailureClass
    reason: str
    message: str
    exit_code: int
    attempt: int
    uid: str
    rank: int = 0
    finished_at: Moment
    step: int = 0
    total_steps: int = 0
    world_size: int = 0
    checkpoint: CheckpointRecord | None = None
    resumed_from: CheckpointRecord | None = None
    skipped_checkpoints: tuple[SkippedCheckpoint, ...] = ()
    artifact: Artifact | None = None
    verdicts: tuple[Verdict, ...] = ()
    guardrails: tuple[GuardrailReport, ...] = ()
    metrics: dict[str, float] = {}
    lineage: dict[str, str] = {}  # name -> digest: data, base model, reward model, config, …

    def compact(self, limit: int = TERMINATION_MESSAGE_LIMIT) -> str:
        """JSON of at most ``limit`` bytes: what matters least goes first, a long message is cut in the middle."""
        slim = self
        drops: tuple[dict[str, Any], ...] = (
            {},
            {"lineage": {}},
            {"skipped_checkpoints": self.skipped_checkpoints[:3]},
            {"guardrails": tuple(one.model_copy(update={"message": ""}) for one in self.guardrails)},
            {"metrics": {}},
            {"verdicts": tuple(verdict.model_copy(update={"message": ""}) for verdict in self.verdicts)},
            {"message": _shorten(self.message, 1000)},
            {"skipped_checkpoints": (), "resumed_from": None},
            {"guardrails": ()},
            {"verdicts": (), "message": _shorten(self.message, 300)},
        )
        for drop in drops:
            slim = slim.model_copy(update=drop)
            text = slim.to_json()
            if len(text.encode()) <= limit:
                return text
        raise ValueError(f"result of {self.uid} does not fit {limit} bytes even without its details")


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :]


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces): the identity of a configuration."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
