"""What the open attempt does: its Job, its pods, its reports and its first failure, taken into the ledger."""

from __future__ import annotations

from rlhf_operator.api.training_status import Attempt
from rlhf_operator.kinds.base import JOB, Object
from rlhf_operator.kinds.training.attempts import folded
from rlhf_operator.kinds.training.children import TRAINER
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.failures import Failure, earliest, of_pod
from rlhf_operator.kinds.training.objects import condition, dig, is_true, later, moment, uid_of
from rlhf_operator.kinds.training.pods import ended, index_of, is_over, is_ready, scheduled_at, waiting
from rlhf_operator.kinds.training.progress import pull_of, report_of, take_report, take_result
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_trainer.wire import FailureClass

_MAX_PODS = 64
_MAX_MESSAGE = 1024
_BLIND_SECONDS = 60.0


def watch_attempt(draft: Draft) -> None:
    attempt = draft.open
    if attempt is None:
        return
    job = draft.job.child(JOB.kind, draft.job.attempt_name(attempt.number))
    pods = _of_this_run(attempt, draft.job.pods(attempt.number, TRAINER))
    if job is not None:
        draft.edit(attempt, job_uid=uid_of(job))
    _identify(draft, pods)
    if job is not None and is_suspended(job):
        _evict(draft, job)
        return
    _take_times(draft, job, pods)
    _take_results(draft, pods)
    _take_first_failure(draft, pods)
    _pull(draft, pods)
    draft.problem = waiting(pods) or draft.problem


def _of_this_run(attempt: Attempt, pods: tuple[Object, ...]) -> tuple[Object, ...]:
    """After an eviction the same Job runs new pods; how the evicted ones ended says nothing about the attempt."""
    if attempt.queued_at is None:
        return pods
    since = attempt.queued_at.replace(microsecond=0)
    return tuple(pod for pod in pods if (moment(pod, "metadata", "creationTimestamp") or since) >= since)


def is_suspended(job: Object) -> bool:
    """By Kueue: the operator never writes this field after the Job is created."""
    return dig(job, "spec", "suspend") is True


def _identify(draft: Draft, pods: tuple[Object, ...]) -> None:
    attempt = _open(draft)
    uids = sorted({*attempt.pod_uids, *(uid_of(pod) for pod in pods)} - {""})
    draft.edit(attempt, pod_uids=uids[:_MAX_PODS])


def _evict(draft: Draft, job: Object) -> None:
    """Kueue took the quota back: the same Job runs anew later, so this attempt waits again. Its use is kept."""
    attempt = _open(draft)
    if attempt.admitted_at is not None:
        since = moment(condition(job, "Suspended"), "lastTransitionTime") if is_true(job, "Suspended") else None
        at = min(max(since, attempt.admitted_at), draft.now) if since is not None else draft.now
        draft.add(folded(attempt, at, draft.size.gpus, draft.cost_per_hour))


def _take_times(draft: Draft, job: Object | None, pods: tuple[Object, ...]) -> None:
    attempt = _open(draft)
    placed = min((at for pod in pods if (at := scheduled_at(pod))), default=None)
    changes: dict[str, object] = {}
    if job is not None and attempt.admitted_at is None:
        changes["admitted_at"] = moment(job, "status", "startTime") or draft.now
    if placed is not None and attempt.scheduled_at is None:
        changes["scheduled_at"] = max(placed, attempt.queued_at or attempt.started_at)
    if attempt.ready_at is None and len(ready(pods)) >= draft.size.nodes:
        changes["ready_at"] = draft.now
    draft.edit(attempt, **changes)


def ready(pods: tuple[Object, ...]) -> tuple[Object, ...]:
    """The pods that are ready or have done their work."""
    return tuple(pod for pod in pods if is_ready(pod) or (is_over(pod) and dig(pod, "status", "phase") == "Succeeded"))


def _take_results(draft: Draft, pods: tuple[Object, ...]) -> None:
    for pod in pods:
        end = ended(pod)
        result = end.result if end is not None else None
        attempt = _open(draft)
        if result is not None and result.attempt == attempt.number and index_of(pod) == 0:
            draft.status = take_result(draft.status, attempt, result)


def _take_first_failure(draft: Draft, pods: tuple[Object, ...]) -> None:
    """Kept when first seen: the pods, and their messages, may be gone before the Job has failed."""
    attempt = _open(draft)
    found = earliest([*known_failure(attempt), *(f for pod in pods if (f := of_pod(pod, draft.now)))])
    if found is not None and attempt.stopping is None:
        note_failure(draft, attempt, found)


def known_failure(attempt: Attempt) -> list[Failure]:
    if attempt.failed_at is None or attempt.failure_class not in set(FailureClass):
        return []
    failure_class = FailureClass(attempt.failure_class)
    reason, message = attempt.reason or failure_class, attempt.message or ""
    return [Failure(failure_class, reason, message, attempt.exit_code, attempt.failed_at)]


def note_failure(draft: Draft, attempt: Attempt, failure: Failure) -> None:
    draft.edit(
        attempt,
        failed_at=failure.at,
        failure_class=str(failure.failure_class),
        reason=failure.reason[:128],
        message=failure.message[:_MAX_MESSAGE],
        exit_code=failure.exit_code,
    )


def _pull(draft: Draft, pods: tuple[Object, ...]) -> None:
    attempt = _open(draft)
    pull = pull_of(pods)
    if pull is None or attempt.stopping is not None:
        return
    draft.pulls.append(pull)
    report = report_of(draft.job, attempt, pull)
    if report is not None:
        draft.status = take_report(draft.status, attempt, report)
    pulled = draft.job.observed.pulled.get(pull.key)
    if pulled is not None and pulled.failing_since is not None and pulled.error is not None:
        blind_at = later(pulled.failing_since, _BLIND_SECONDS)
        draft.wake(blind_at)
        if blind_at <= draft.now and attempt.running_at is not None:
            draft.problem = (Reason.NO_PROGRESS, "rank 0 does not answer on /status; training may well go on")


def _open(draft: Draft) -> Attempt:
    attempt = draft.open
    assert attempt is not None  # watch_attempt checks it, and nothing here ends an attempt
    return attempt
