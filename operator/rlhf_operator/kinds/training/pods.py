"""What the pods of an attempt show: readiness, why they wait, and how each of them ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from rlhf_operator.kinds.base import Object
from rlhf_operator.kinds.training.objects import (
    condition,
    deleting,
    integer,
    is_true,
    label_of,
    later,
    mapping,
    mappings,
    moment,
    name_of,
    text,
)
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_trainer.wire import Result

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_PULL_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True)
class Ended:
    """A terminated container: `message` is its termination message, `result` what that says if it is a Result."""

    exit_code: int
    reason: str
    message: str
    finished_at: datetime | None
    result: Result | None
    container: str


def index_of(pod: Object) -> int | None:
    """The completion index: torchrun's node rank."""
    label = label_of(pod, INDEX_LABEL) or text(mapping(pod, "metadata", "annotations"), INDEX_LABEL)
    return int(label) if label.isascii() and label.isdigit() and len(label) < 10 else None


def is_over(pod: Object) -> bool:
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def is_ready(pod: Object) -> bool:
    return is_true(pod, "Ready") and not deleting(pod)


def scheduled_at(pod: Object) -> datetime | None:
    return moment(condition(pod, "PodScheduled"), "lastTransitionTime") if is_true(pod, "PodScheduled") else None


def deletion_requested_at(pod: Object) -> datetime | None:
    """deletionTimestamp is when the grace period ends, not when somebody asked."""
    ends = moment(pod, "metadata", "deletionTimestamp")
    if ends is None:
        return None
    grace = integer(pod, "metadata", "deletionGracePeriodSeconds")
    if grace is None:
        grace = integer(pod, "spec", "terminationGracePeriodSeconds") or 0
    return later(ends, -min(max(grace, 0), 86_400))


def ended(pod: Object, name: str = "trainer") -> Ended | None:
    """How a container ended; an init container that failed its pod stands for one that never ran. While the pod lives
    it is a sidecar, which the kubelet starts again."""
    for status in mappings(pod, "status", "containerStatuses"):
        if text(status, "name") == name and mapping(status, "state", "terminated"):
            return _ended(status)
    for status in mappings(pod, "status", "initContainerStatuses") if is_over(pod) else ():
        if integer(status, "state", "terminated", "exitCode") not in (None, 0):
            return _ended(status)
    return None


def _ended(status: Object) -> Ended:
    state = mapping(status, "state", "terminated")
    code = integer(state, "exitCode")
    message = text(state, "message")
    return Ended(
        exit_code=1 if code is None else code,
        reason=text(state, "reason"),
        message=message,
        finished_at=moment(state, "finishedAt"),
        result=parse_result(message),
        container=text(status, "name"),
    )


def parse_result(message: Any) -> Result | None:
    """A termination message as a Result; None when it is anything else."""
    try:
        return Result.model_validate_json(message) if isinstance(message, str) and message else None
    except ValidationError:
        return None


def waiting(pods: tuple[Object, ...]) -> tuple[Reason, str] | None:
    """Why pods do not start: the first of image, configuration and scheduling problems, in words."""
    for pod in sorted(pods, key=name_of):
        for status in (
            *mappings(pod, "status", "initContainerStatuses"),
            *mappings(pod, "status", "containerStatuses"),
        ):
            state = mapping(status, "state", "waiting")
            if text(state, "reason") in _PULL_REASONS:
                image = text(status, "image") or "the image"
                return Reason.IMAGE_PULL_FAILED, f"pod {name_of(pod)} cannot pull {image}: check its name and access"
            if text(state, "reason") == Reason.CONTAINER_CONFIG_ERROR:
                message = text(state, "message") or "a Secret or ConfigMap is missing"
                return Reason.CONTAINER_CONFIG_ERROR, (
                    f"pod {name_of(pod)} cannot be configured: {message}; it starts once that is there"
                )
    for pod in sorted(pods, key=name_of):
        placed = condition(pod, "PodScheduled")
        if text(placed, "status") == "False" and text(placed, "reason") == "Unschedulable":
            return Reason.UNSCHEDULABLE, f"pod {name_of(pod)} has no node: {text(placed, 'message')}"
    return None
