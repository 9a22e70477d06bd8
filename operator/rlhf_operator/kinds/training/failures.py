"""How an attempt failed, and what follows: the exit table, the earliest failure, the user's rules.

Survivors of a failure are ended by the Job controller and report "preempted", so the class of an attempt is that of
its earliest failure. Kubernetes gives whole seconds; within one second a cause goes before its consequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from rlhf_operator.api.training import FailureAction, FailurePolicy, FailureRule
from rlhf_operator.kinds.base import Object
from rlhf_operator.kinds.training.objects import condition, is_true, moment, name_of, text
from rlhf_operator.kinds.training.pods import Ended, deletion_requested_at, ended, is_over
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_trainer.wire import ExitCode, FailureClass, Result

Action = Literal["Complete", "Fail", "Restart", "Suspend"]


@dataclass(frozen=True)
class Row:
    """One row of the exit table (docs/design.md, "Ends")."""

    action: Action
    counted: bool
    reason: Reason


TABLE: dict[FailureClass, Row] = {
    FailureClass.SUCCESS: Row("Complete", False, Reason.AS_EXPECTED),
    FailureClass.GATE_FAILED: Row("Fail", False, Reason.REWARD_GATE_FAILED),
    FailureClass.INVALID: Row("Fail", False, Reason.INVALID_DATA),
    FailureClass.DIVERGED: Row("Fail", False, Reason.DIVERGED),
    FailureClass.GUARDRAIL_STOPPED: Row("Fail", False, Reason.GUARDRAIL_BREACHED),
    FailureClass.GUARDRAIL_PAUSED: Row("Suspend", False, Reason.GUARDRAIL_BREACHED),
    FailureClass.PREEMPTED: Row("Restart", False, Reason.PREEMPTED_BY_SCHEDULER),
    FailureClass.RENDEZVOUS: Row("Restart", True, Reason.RENDEZVOUS_FAILED),
    FailureClass.NO_PROGRESS: Row("Restart", True, Reason.NO_PROGRESS),
    FailureClass.OUT_OF_MEMORY: Row("Fail", False, Reason.OUT_OF_MEMORY),
    FailureClass.INFRASTRUCTURE: Row("Restart", False, Reason.NODE_LOST),
    FailureClass.UNKNOWN: Row("Restart", True, Reason.OUTCOME_UNKNOWN),
}

EXIT_CLASSES: dict[int, FailureClass] = {
    ExitCode.SUCCESS: FailureClass.SUCCESS,
    ExitCode.GATE_FAILED: FailureClass.GATE_FAILED,
    ExitCode.INVALID: FailureClass.INVALID,
    ExitCode.DIVERGED: FailureClass.DIVERGED,
    ExitCode.GUARDRAIL_STOPPED: FailureClass.GUARDRAIL_STOPPED,
    ExitCode.GUARDRAIL_PAUSED: FailureClass.GUARDRAIL_PAUSED,
    ExitCode.PREEMPTED: FailureClass.PREEMPTED,
    ExitCode.RENDEZVOUS: FailureClass.RENDEZVOUS,
    ExitCode.NO_PROGRESS: FailureClass.NO_PROGRESS,
}

SIGKILLED, SIGTERMED = 137, 143
# Ends that another failure, or a stop from outside, brings about: after any cause in the same second.
_CONSEQUENCES = {FailureClass.RENDEZVOUS: 1, FailureClass.PREEMPTED: 2}


@dataclass(frozen=True)
class Failure:
    failure_class: FailureClass
    reason: str  # of the trainer, the container or the disruption
    message: str
    exit_code: int | None
    at: datetime

    @property
    def order(self) -> tuple[int, int, str]:
        unasked = self.exit_code == ExitCode.PREEMPTED and self.failure_class is FailureClass.UNKNOWN
        rank = 3 if unasked else _CONSEQUENCES.get(self.failure_class, 0)  # its peer was asked to stop, and told it
        return int(self.at.timestamp()), rank, self.message


def earliest(failures: Iterable[Failure]) -> Failure | None:
    return min(failures, key=lambda failure: failure.order, default=None)


def of_pod(pod: Object, now: datetime) -> Failure | None:
    """The failure of one pod; None while it runs, is waiting, or has succeeded."""
    end = ended(pod)
    if end is not None and end.exit_code == 0 and end.container == "trainer":
        return None
    if disrupted := _disruption(pod, end):
        return disrupted
    if end is not None:
        return _of_container(pod, end, now)
    if is_over(pod) and text(pod, "status", "phase") == "Failed":
        reason = text(pod, "status", "reason") or Reason.NODE_LOST
        message = text(pod, "status", "message") or "it failed without its container having run"
        return Failure(FailureClass.INFRASTRUCTURE, reason, f"pod {name_of(pod)}: {message}", None, now)
    return None


def of_result(result: Result, pod_name: str = "rank 0") -> Failure:
    """What a result.json that outlived its pods says."""
    message = f"pod {pod_name}: {result.message}"
    return Failure(result.failure_class, result.reason, message, result.exit_code, result.finished_at)


def _disruption(pod: Object, end: Ended | None) -> Failure | None:
    """Eviction, scheduler preemption, node loss: only when the pod was stopped by it, not when it failed before.

    A pod with this condition is about to go, even if its node is lost and nobody will ever report its end.
    """
    disruption = condition(pod, "DisruptionTarget")
    at = deletion_requested_at(pod) or moment(disruption, "lastTransitionTime")
    if not is_true(pod, "DisruptionTarget") or at is None or not (end is None or _stopped(end)):
        return None
    cause = text(disruption, "reason")
    reason = Reason.PREEMPTED_BY_SCHEDULER if cause == "PreemptionByScheduler" else Reason.NODE_LOST
    said = text(disruption, "message")
    message = f"pod {name_of(pod)} was disrupted ({cause or 'no cause given'}): {said}"
    failure_class = FailureClass.INFRASTRUCTURE
    if cause == "TerminationByKubelet" and "ephemeral-storage" in said:
        # Pods that fill the disk of whatever node they get would be started anew for ever: this one is counted.
        failure_class, reason = FailureClass.UNKNOWN, Reason.NO_SPACE
        message += "; request ephemeral-storage in spec.trainer, or give large inputs a volume of their own"
    return Failure(failure_class, reason, message, end.exit_code if end else None, at)


def _stopped(end: Ended) -> bool:
    return end.reason != "OOMKilled" and end.exit_code in (ExitCode.PREEMPTED, SIGKILLED, SIGTERMED)


def _of_container(pod: Object, end: Ended, now: datetime) -> Failure:
    failure_class = _class_of(pod, end)
    at = end.finished_at or now
    if failure_class is FailureClass.PREEMPTED:
        at = min(at, deletion_requested_at(pod) or at)
    elif end.result is not None:
        at = end.result.finished_at
    where = "" if end.container == "trainer" else f" container {end.container}"
    said = end.result.message if end.result else end.message.strip()[-600:]
    message = f"pod {name_of(pod)}{where} exited {end.exit_code}: {said or end.reason or 'it left no message'}"
    reason = "OOMKilled" if end.reason == "OOMKilled" else (end.result.reason if end.result else end.reason)
    return Failure(failure_class, reason or failure_class, message, end.exit_code, at)


def _class_of(pod: Object, end: Ended) -> FailureClass:
    if end.reason == "OOMKilled":
        return FailureClass.OUT_OF_MEMORY
    if end.container != "trainer":
        return FailureClass.UNKNOWN
    said = end.result.failure_class if end.result and end.result.exit_code == end.exit_code else None
    found = said or EXIT_CLASSES.get(end.exit_code, FailureClass.UNKNOWN)
    if deletion_requested_at(pod) is not None and end.exit_code in (SIGTERMED, SIGKILLED):
        return FailureClass.PREEMPTED  # ended before its handler could answer
    if found is FailureClass.PREEMPTED and deletion_requested_at(pod) is None:
        return FailureClass.UNKNOWN  # a SIGTERM that nobody in the cluster sent
    return FailureClass.UNKNOWN if found is FailureClass.SUCCESS else found


@dataclass(frozen=True)
class Consequence:
    """What follows from a failure. `reason` is that of the Failed condition if the job fails."""

    action: Action
    counted: bool
    reason: Reason
    because: str  # for people


def decide(failure: Failure, policy: FailurePolicy, counted_before: int, gate_reason: Reason) -> Consequence:
    """The user's rules first, then the exit table, then the limit of counted restarts."""
    row = TABLE[failure.failure_class]
    reason = gate_reason if failure.failure_class is FailureClass.GATE_FAILED else row.reason
    action, counted, because = row.action, row.counted, f"class {failure.failure_class}"
    rule = next((rule for rule in policy.rules if matches(rule, failure)), None)
    if rule is not None:
        action = "Fail" if rule.action is FailureAction.FAIL_JOB else "Restart"
        counted = rule.action is FailureAction.RESTART
        reason, because = Reason.NON_RETRIABLE_EXIT_CODE, f"rule {rule.name}"
    if action == "Restart" and counted and counted_before >= policy.max_restarts:
        because += f", and all {policy.max_restarts} counted restarts are used"
        return Consequence("Fail", False, Reason.MAX_RESTARTS_REACHED, because)
    return Consequence(action, counted and action == "Restart", reason, because)


def matches(rule: FailureRule, failure: Failure) -> bool:
    """Every list that is given must match."""
    by_code = not rule.on_exit_codes or failure.exit_code in rule.on_exit_codes
    by_reason = not rule.on_reasons or failure.reason in rule.on_reasons or failure.failure_class in rule.on_reasons
    by_message = not rule.on_messages or any(part in failure.message for part in rule.on_messages)
    return by_code and by_reason and by_message
