"""Why a plan could not be executed: what the user reads, and when it is tried again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from rlhf_operator.api.conditions import Truth, set_condition
from rlhf_operator.api.meta import ConditionStatus
from rlhf_operator.kube.errors import ApiError, Outcome


class Reason(StrEnum):
    """Of the conditions that the engine itself sets."""

    FOREIGN_OWNER = "ForeignOwner"
    INVALID_CHILD = "InvalidChild"
    FORBIDDEN = "Forbidden"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    NAMESPACE_TERMINATING = "NamespaceTerminating"
    WAITING_FOR_DELETION = "WaitingForDeletion"
    INTERNAL_ERROR = "InternalError"


@dataclass(eq=False)  # an exception: it must stay hashable and writable
class Wait(Exception):
    """An ordinary state of the world: try again after `after` seconds, it is nobody's mistake."""

    reason: str
    message: str
    after: float


@dataclass(eq=False)  # an exception: it must stay hashable and writable
class Terminal(Exception):
    """Only a person can help: by another spec, or by removing what is in the way."""

    reason: str
    message: str


@dataclass(eq=False)  # an exception: it must stay hashable and writable
class Broken(Exception):
    """Something is wrong that is neither the user's doing nor ordinary: a condition, and retries with backoff."""

    reason: str
    message: str


Failure = Wait | Terminal | Broken
QUOTA_SECONDS = 30.0


def from_api(error: ApiError) -> Failure | None:
    """None: nothing to tell the user, only to try again."""
    match error.outcome:
        case Outcome.INVALID:
            return Terminal(Reason.INVALID_CHILD, f"the API server refuses what this spec leads to: {error.message}")
        case Outcome.WAIT:
            quota = "exceeded quota" in error.message
            reason = Reason.WAITING_FOR_QUOTA if quota else Reason.NAMESPACE_TERMINATING
            return Wait(reason, error.message, QUOTA_SECONDS)
        case Outcome.FORBIDDEN:
            return Broken(Reason.FORBIDDEN, f"the operator may not do this; check its role: {error.message}")
        case _:
            return None


def overlay(
    status: Mapping[str, Any],
    failure: Failure | None,
    *,
    live: Mapping[str, Any],
    type: str,
    generation: int,
    now: datetime,
) -> dict[str, Any]:
    """The planned status, with the failure in its condition `type`. The transition time is kept from `live`."""
    if failure is None:
        return dict(status)
    planned = [c for c in map(_read, status.get("conditions") or ()) if c is not None]
    before = [c for c in map(_read, live.get("conditions") or ()) if c is not None and c.type == type]
    base = [*(c for c in planned if c.type != type), *before]
    order = [c.type for c in planned]
    truth = Truth.UNKNOWN if isinstance(failure, Wait) else Truth.FALSE
    found = set_condition(base, type, truth, failure.reason, failure.message, generation=generation, now=now)
    found.sort(key=lambda c: order.index(c.type) if c.type in order else len(order))
    return {**status, "conditions": [c.model_dump(mode="json", by_alias=True) for c in found]}


def _read(raw: Mapping[str, Any]) -> ConditionStatus | None:
    try:
        return ConditionStatus.model_validate(raw)
    except ValueError:
        return None  # not ours: an unreadable condition must not hide the failure
