"""The reasons of conditions and the words for ends: one vocabulary for both job kinds."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    # Nothing is wrong.
    AS_EXPECTED = "AsExpected"
    NOT_YET = "NotYet"
    # Nothing is wrong yet.
    WILL_EXCEED_DEADLINE = "WillExceedDeadline"
    WILL_EXHAUST_BUDGET = "WillExhaustBudget"
    # Waiting.
    WAITING_FOR_QUOTA = "WaitingForQuota"
    WAITING_FOR_UPSTREAM = "WaitingForUpstream"
    WAITING_FOR_CLAIM = "WaitingForClaim"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG_ERROR = "CreateContainerConfigError"
    PODS_STARTING = "PodsStarting"
    RESTARTING = "Restarting"
    STOPPING = "Stopping"
    # Refused.
    INVALID_DATA = "InvalidData"
    NO_PRICE = "NoPrice"
    DIGEST_MISMATCH = "DigestMismatch"
    FOREIGN_OWNER = "ForeignOwner"
    # Suspended.
    SUSPENDED = "Suspended"
    BUDGET_EXHAUSTED = "BudgetExhausted"
    GUARDRAIL_BREACHED = "GuardrailBreached"
    # How attempts and jobs end.
    CHECKPOINT_MISSING = "CheckpointMissing"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    DIVERGED = "Diverged"
    EVALUATION_GATE_FAILED = "EvaluationGateFailed"
    MAX_RESTARTS_REACHED = "MaxRestartsReached"
    NODE_LOST = "NodeLost"
    NON_RETRIABLE_EXIT_CODE = "NonRetriableExitCode"
    NO_PROGRESS = "NoProgress"
    NO_SPACE = "NoSpace"
    OUTCOME_UNKNOWN = "OutcomeUnknown"
    OUT_OF_MEMORY = "OutOfMemory"
    PREEMPTED_BY_SCHEDULER = "PreemptedByScheduler"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    RENDEZVOUS_FAILED = "RendezvousFailed"
    RENDEZVOUS_MISMATCH = "RendezvousMismatch"
    REWARD_GATE_FAILED = "RewardGateFailed"
    WAIVED = "Waived"
