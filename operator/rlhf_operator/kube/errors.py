"""What an error of the Kubernetes API means for a reconcile: one table, used by everything that writes.

status                     outcome     what the engine does
404 on read or delete      ABSENT      the object is gone: that is an answer, not an error
409 AlreadyExists          EXISTS      look who owns the one that is there
409 Conflict               CONFLICT    read again, plan again, at once
410                        EXPIRED     list again
422, 400                   INVALID     terminal: only another spec can help
403, quota                 WAIT        ordinary waiting, with the quota's message
403, namespace terminating WAIT        the garbage collector is at work
403, other                 FORBIDDEN   slow retry and a condition: an administrator must act
401, 429, 5xx, timeouts    RETRY       exponential backoff, not before Retry-After
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

TIMEOUT = 0  # stands for the HTTP status when no answer came


class Outcome(StrEnum):
    ABSENT = "Absent"
    EXISTS = "Exists"
    CONFLICT = "Conflict"
    EXPIRED = "Expired"
    INVALID = "Invalid"
    WAIT = "Wait"
    FORBIDDEN = "Forbidden"
    RETRY = "Retry"


class ApiError(Exception):
    """The API server refused a request, or did not answer (status 0)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str = "",
        causes: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.causes = causes
        self.retry_after = retry_after

    @classmethod
    def from_body(cls, status: int, body: Any, what: str, retry_after: float | None = None) -> ApiError:
        """From the `Status` object of an answer; `what` names the request, e.g. "apply Job ns/name"."""
        data: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
        details: Mapping[str, Any] = data.get("details") or {}
        text = data.get("message") or (body if isinstance(body, str) and body else f"HTTP {status}")
        return cls(
            status,
            f"{what}: {text}",
            reason=str(data.get("reason") or ""),
            causes=tuple(str(c.get("reason", "")) for c in details.get("causes") or ()),
            retry_after=retry_after,
        )

    @property
    def outcome(self) -> Outcome:
        return classify(self)


def classify(error: ApiError) -> Outcome:
    """The table above."""
    match error.status:
        case 404:
            return Outcome.ABSENT
        case 409:
            return Outcome.EXISTS if error.reason == "AlreadyExists" else Outcome.CONFLICT
        case 410:
            return Outcome.EXPIRED
        case 400 | 422:
            return Outcome.INVALID
        case 403:
            waiting = "exceeded quota" in error.message or "NamespaceTerminating" in error.causes
            return Outcome.WAIT if waiting else Outcome.FORBIDDEN
        case _:
            return Outcome.RETRY
