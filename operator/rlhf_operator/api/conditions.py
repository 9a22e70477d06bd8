"""Conditions: the vocabulary, and pure functions over a list of meta/v1 Conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum

from rlhf_operator.api.meta import ConditionStatus

MAX_MESSAGE = 32768  # meta/v1's limit; a longer message is cut, not refused


class JobCondition(StrEnum):
    """Of RewardModelJob and PolicyOptimizationJob."""

    ACCEPTED = "Accepted"
    ADMITTED = "Admitted"
    PODS_READY = "PodsReady"
    PROGRESSING = "Progressing"
    CHECKPOINTED = "Checkpointed"
    GUARDRAILS_HEALTHY = "GuardrailsHealthy"
    WITHIN_BUDGET = "WithinBudget"
    VALIDATED = "Validated"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class RolloutCondition(StrEnum):
    """Of PolicyRollout."""

    READY = "Ready"
    PROGRESSING = "Progressing"
    STABLE_AVAILABLE = "StableAvailable"
    CANDIDATE_AVAILABLE = "CandidateAvailable"
    ROUTE_PROGRAMMED = "RouteProgrammed"
    SPLIT_VERIFIED = "SplitVerified"
    METRICS_AVAILABLE = "MetricsAvailable"
    SAFETY_OK = "SafetyOK"
    APPROVED = "Approved"
    DEGRADED = "Degraded"


class Truth(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"

    @classmethod
    def of(cls, value: bool | None) -> Truth:
        """None is Unknown."""
        if value is None:
            return cls.UNKNOWN
        return cls.TRUE if value else cls.FALSE


def set_condition(
    conditions: Iterable[ConditionStatus],
    type: str,
    status: Truth | bool | None,
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> list[ConditionStatus]:
    """The conditions with one of them set; the others and the order stay.

    `lastTransitionTime` moves only when the status flips, so that an age means "true since". `generation` is the
    object's metadata.generation that this judgement is about. `now` must be aware.
    """
    value = str(status if isinstance(status, Truth) else Truth.of(status))
    before = list(conditions)
    old = find(before, type)
    since = old.last_transition_time if old is not None and old.status == value else rfc3339(now)
    new = ConditionStatus(
        type=str(type),
        status=value,
        reason=str(reason),
        message=message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…",
        last_transition_time=since,
        observed_generation=generation,
    )
    if old is None:
        return [*before, new]
    return [new if condition.type == type else condition for condition in before]


def remove_condition(conditions: Iterable[ConditionStatus], type: str) -> list[ConditionStatus]:
    return [condition for condition in conditions if condition.type != type]


def find(conditions: Iterable[ConditionStatus], type: str) -> ConditionStatus | None:
    return next((condition for condition in conditions if condition.type == type), None)


def is_true(conditions: Iterable[ConditionStatus], type: str) -> bool:
    """Whether it is there and True; absent is not true."""
    condition = find(conditions, type)
    return condition is not None and condition.status == Truth.TRUE


def first_true(conditions: Sequence[ConditionStatus], types: Iterable[str]) -> str | None:
    """The first of `types` that holds: phases are derived with it."""
    return next((type for type in types if is_true(conditions, type)), None)


def rfc3339(moment: datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds, Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
