"""The end of an attempt: its outcome goes into the ledger once nothing of it runs any more."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from rlhf_operator.api.training_status import Attempt
from rlhf_operator.kinds.base import JOB, Object
from rlhf_operator.kinds.training.attempts import counted, spent
from rlhf_operator.kinds.training.children import REPORTER, TRAINER, reporter
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.failures import Consequence, Failure, decide, of_result
from rlhf_operator.kinds.training.objects import condition, deleting, is_true, later, moment
from rlhf_operator.kinds.training.pods import ended, index_of, is_over, parse_result
from rlhf_operator.kinds.training.progress import take_result
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.storage import uri_of
from rlhf_operator.kinds.training.watching import known_failure, note_failure
from rlhf_trainer.wire import FailureClass, Result

# A pod on a lost node stays Terminating for ever. Going on without it is safe: it writes into its own folder only.
ABANDON_SECONDS = 300.0
# The Job's end may be seen before the pods' ends, which carry the messages.
_STRAGGLER_SECONDS = 60.0

End = Literal["Complete", "Failed", "Gone"]


def close_attempt(draft: Draft) -> None:
    attempt = draft.open
    if attempt is None:
        return
    if attempt.stopping is not None:
        _close_stopped(draft, attempt)
        return
    end = _end_of(draft, attempt)
    if end is None:
        return
    if end != "Complete" and (known := known_failure(attempt)):
        _close_failed(draft, attempt, known[0])
        return
    result = _final_result(draft, attempt) if end == "Complete" else None
    if result is not None:
        _close_complete(draft, attempt, result)
    elif not _await_stragglers(draft, attempt):
        _ask_reporter(draft, attempt)


def outcome_is_known(draft: Draft, attempt: Attempt) -> bool:
    """Too late to stop it: it failed, its Job is over, or will be as soon as its controller has looked."""
    done = _final_result(draft, attempt) is not None and not running(draft, draft.job.pods(attempt.number, TRAINER))
    return done or attempt.failed_at is not None or _job_end(draft, attempt) is not None


def running(draft: Draft, pods: tuple[Object, ...]) -> tuple[Object, ...]:
    """Pods that may still write; those on a lost node are abandoned in the end."""
    found = []
    for pod in pods:
        leaves = moment(pod, "metadata", "deletionTimestamp")
        abandoned_at = later(leaves, ABANDON_SECONDS) if leaves else None
        if is_over(pod) or (abandoned_at is not None and abandoned_at <= draft.now):
            continue
        draft.wake(abandoned_at)
        found.append(pod)
    return tuple(found)


def _job(draft: Draft, attempt: Attempt) -> Object | None:
    return draft.job.child(JOB.kind, draft.job.attempt_name(attempt.number))


def _job_end(draft: Draft, attempt: Attempt) -> End | None:
    job = _job(draft, attempt)
    if job is None:
        return "Gone" if attempt.job_uid else None
    if is_true(job, "Complete"):
        return "Complete"
    return "Failed" if is_true(job, "Failed") else None


def _end_of(draft: Draft, attempt: Attempt) -> End | None:
    """How the Job ended, once its pods have; a Job that cannot finish for a lost node is given up."""
    end = _job_end(draft, attempt)
    pods = draft.job.pods(attempt.number, TRAINER)
    if end in ("Complete", "Failed"):
        return end
    job = _job(draft, attempt)
    if end == "Gone":
        return None if running(draft, pods) else end
    if job is not None and deleting(job) and not running(draft, pods):
        return "Gone"
    failing = condition(job, "FailureTarget") if job is not None and is_true(job, "FailureTarget") else {}
    since = moment(failing, "lastTransitionTime")
    if since is None:
        return None
    if known_failure(attempt) and not running(draft, pods):
        return "Failed"
    given_up = later(since, ABANDON_SECONDS)
    draft.wake(given_up)
    return "Failed" if given_up <= draft.now else None


def _close_stopped(draft: Draft, attempt: Attempt) -> None:
    job = _job(draft, attempt)
    gone = job is None or (deleting(job) and bool(attempt.job_uid))
    if not gone or running(draft, draft.job.pods(attempt.number, TRAINER)):
        return
    _close(draft, attempt, lost=False)


def _final_result(draft: Draft, attempt: Attempt) -> Result | None:
    """Rank 0's result, if it says what a success must say."""
    for pod in draft.job.pods(attempt.number, TRAINER):
        end = ended(pod)
        if end is not None and index_of(pod) == 0 and _proves_success(end.result, attempt):
            return end.result
    return None


def _proves_success(result: Result | None, attempt: Attempt) -> bool:
    return (
        result is not None
        and result.attempt == attempt.number
        and result.failure_class is FailureClass.SUCCESS
        and result.artifact is not None
        and uri_of(result.artifact.path) is not None
    )


def _await_stragglers(draft: Draft, attempt: Attempt) -> bool:
    """Whether pods are there whose ends have not been seen yet, and may still be."""
    pods = running(draft, draft.job.pods(attempt.number, TRAINER))
    job = _job(draft, attempt)
    if not pods or job is None:
        return False
    end = condition(job, "Complete") or condition(job, "Failed")
    since: datetime = moment(end, "lastTransitionTime") or draft.now
    until = later(since, _STRAGGLER_SECONDS)
    draft.wake(until)
    return until > draft.now


def _ask_reporter(draft: Draft, attempt: Attempt) -> None:
    """The messages are gone: a small pod reads result.json again."""
    job = draft.job.child(JOB.kind, draft.job.report_name(attempt.number))
    pods = draft.job.pods(attempt.number, REPORTER)
    ends = (end for pod in pods if (end := ended(pod, REPORTER)) is not None)
    result = next((found for end in ends if (found := parse_result(end.message))), None)
    if result is not None and result.attempt == attempt.number:
        draft.status = take_result(draft.status, attempt, result)
        attempt = draft.open or attempt
        if _proves_success(result, attempt):
            _close_complete(draft, attempt, result)
            return
        if result.failure_class is not FailureClass.SUCCESS:
            _close_failed(draft, attempt, of_result(result))
            return
    if job is None:
        draft.create(reporter(draft.job, attempt.number))
        draft.waiting = (
            Reason.OUTCOME_UNKNOWN,
            f"the pods of attempt {attempt.number} left no message; asking storage",
        )
    elif is_true(job, "Failed") or (is_true(job, "Complete") and not running(draft, pods)):
        _close_failed(draft, attempt, _unknown(attempt, draft.now))
    else:
        draft.waiting = (
            Reason.OUTCOME_UNKNOWN,
            f"the pods of attempt {attempt.number} left no message; asking storage",
        )


def _unknown(attempt: Attempt, now: datetime) -> Failure:
    message = (
        f"how attempt {attempt.number} ended is not known: its pods are gone, or exited 0 without a result, and "
        "there is no result.json of it in the output"
    )
    return Failure(FailureClass.UNKNOWN, Reason.OUTCOME_UNKNOWN, message, None, now)


def _close_complete(draft: Draft, attempt: Attempt, result: Result) -> None:
    draft.edit(
        attempt,
        failure_class=str(FailureClass.SUCCESS),
        reason=result.reason[:128],
        message=result.message[:1024],
        exit_code=result.exit_code,
        action="Complete",
        failed_at=None,
    )
    _close(draft, draft.open or attempt, lost=False)


def _close_failed(draft: Draft, attempt: Attempt, failure: Failure) -> None:
    policy = draft.job.spec.failure_policy
    follows: Consequence = decide(failure, policy, counted(draft.status), draft.job.kind.gate_reason)
    note_failure(draft, attempt, failure)
    noted = draft.open or attempt
    draft.edit(noted, counted=follows.counted, action=follows.action)
    if follows.action == "Fail":
        draft.ended = (follows.reason, f"{failure.message} ({follows.because})")
    _close(draft, draft.open or noted, lost=True)


def _close(draft: Draft, attempt: Attempt, lost: bool) -> None:
    until = _held_until(draft, attempt)
    usage = spent(attempt, until, draft.size.gpus, draft.cost_per_hour)
    if lost and attempt.action == "Restart" and attempt.running_at is not None:
        saved = [c.time for c in draft.status.checkpoints if c.attempt == attempt.number and c.time.tzinfo]
        since = max([attempt.running_at, *saved])
        seconds = max((until - since).total_seconds(), 0.0)
        usage = usage.model_copy(update={"lost_seconds": round(usage.lost_seconds + seconds, 3)})
    changes: dict[str, Any] = {"ended_at": draft.now, "usage": usage}
    draft.edit(attempt, **changes)


def _held_until(draft: Draft, attempt: Attempt) -> datetime:
    """When the pods let go of their nodes. An operator that was away learns of it later, which nobody used."""
    job = _job(draft, attempt)
    finished = next((condition(job, type) for type in ("Complete", "Failed") if is_true(job, type)), None)
    if finished is None:
        return draft.now
    ends = [end.finished_at for pod in draft.job.pods(attempt.number, TRAINER) if (end := ended(pod)) is not None]
    known = [at for at in (moment(finished, "lastTransitionTime"), *ends) if at is not None]
    return min([draft.now, max(known)]) if known else draft.now
