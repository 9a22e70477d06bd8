"""Between attempts: whether the next one may start, what it waits for, and what is left of the ones before."""

from __future__ import annotations

from typing import Any

from rlhf_operator.api.training_status import ArtifactStatus, Attempt
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, SERVICE, Object
from rlhf_operator.kinds.training import children
from rlhf_operator.kinds.training.attempts import backoff
from rlhf_operator.kinds.training.claims import Use, claim_key, claim_of, missing, unsuitable
from rlhf_operator.kinds.training.closing import running
from rlhf_operator.kinds.training.decisions import acknowledgement
from rlhf_operator.kinds.training.draft import Draft, Why
from rlhf_operator.kinds.training.environment import taken_env
from rlhf_operator.kinds.training.job import attempt_of
from rlhf_operator.kinds.training.objects import moment, text
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.storage import BadUri, Volume, scratch_is_a_claim
from rlhf_operator.kinds.training.upstream import Resolution, resolve
from rlhf_trainer.wire import FailureClass, digest_of


def adopt_children(draft: Draft) -> None:
    """A Job that the ledger does not know: the status was lost. It is the current attempt, its name is taken.

    The number is taken into the status before anything that shows it may be deleted.
    """
    draft.set(attempt=draft.job.highest_attempt)
    job = max(draft.job.children(JOB.kind), key=attempt_of, default=None)
    known = max((attempt.number for attempt in draft.status.attempts), default=0)
    if job is None or attempt_of(job) <= known or text(job, "metadata", "name") != _trainer_name(draft, job):
        return
    started_at = moment(job, "metadata", "creationTimestamp") or draft.now
    draft.add(Attempt(number=attempt_of(job), started_at=started_at))


def _trainer_name(draft: Draft, job: Any) -> str:
    return draft.job.attempt_name(attempt_of(job))


def go_on(draft: Draft) -> None:
    """Ends the job, holds it, lets it wait, or starts the next attempt; restores lost children of the open one."""
    refusal = refused(draft)
    resolution = resolve(draft.job) if refusal is None else Resolution()
    refusal = refusal or resolution.refused
    draft.refused = refusal or (unmountable(draft, resolution) if not resolution.waiting else None) or _drifted(draft)
    if draft.open is not None:
        if draft.open.stopping is None and draft.refused is None and not resolution.waiting:
            _make_children(draft, draft.open, resolution)
        return
    last = draft.last
    if draft.ended is None and last is not None and last.action == "Complete":
        draft.ended = (Reason.AS_EXPECTED, f"attempt {last.number} completed the training")
    if draft.ended is None and last is not None and last.action == "Fail":
        draft.ended = (_reason(last.stopping or last.reason), last.message or "")
    if draft.ended is None:
        _hold_or_start(draft, resolution)


def _reason(name: str | None) -> Reason:
    return Reason(name) if name in set(Reason) else Reason.OUTCOME_UNKNOWN


def _hold_or_start(draft: Draft, resolution: Resolution) -> None:
    draft.held = _held(draft)
    if draft.held is not None:
        draft.set(pod_template_digest=None)  # free to change, also together with what ends the hold: nothing runs
    if draft.held is not None or draft.ended is not None or draft.refused is not None:
        return
    if resolution.waiting:
        draft.waiting = (Reason.WAITING_FOR_UPSTREAM, resolution.waiting)
        return
    draft.waiting = _claims(draft, resolution) or _leftovers(draft) or _backoff(draft)
    if draft.waiting is None:
        _start(draft, resolution)


def _held(draft: Draft) -> Why | None:
    """Why the job is suspended; a limit that fails the job ends it instead."""
    if draft.job.spec.suspend:
        return Reason.SUSPENDED, "spec.suspend is set; the next attempt starts from the newest checkpoint"
    struck = next((limit.stop for limit in draft.limits() if limit.struck(draft.now)), None)
    if struck is not None and struck.action == "Fail":
        draft.ended = (struck.reason, struck.message)
        return None
    if struck is not None:
        return struck.reason, f"{struck.message}; raise spec.budget to go on"
    return _paused(draft)


def _paused(draft: Draft) -> Why | None:
    """A guardrail pauses until somebody answers for going on."""
    last = draft.last
    if last is None or last.failure_class != FailureClass.GUARDRAIL_PAUSED or last.action != "Suspend":
        return None
    if last.released_by is not None:
        return None
    answer = acknowledgement(draft.job, last.number, last.ended_at or draft.now)
    if answer is not None:
        draft.edit(last, released_by=answer.name)
        return None
    how = (
        "" if draft.job.observed.decisions_honoured else "; decisions are not honoured: the admission policy is missing"
    )
    return Reason.GUARDRAIL_BREACHED, (
        f"{last.message or 'a guardrail paused the job'}; it goes on after a Decision Acknowledge for attempt "
        f"{last.number}{how}"
    )


def unmountable(draft: Draft, resolution: Resolution) -> Why | None:
    """A claim that the pods cannot share, or cannot write to."""
    uses, claims = _uses(draft, resolution)
    problem = unsuitable(uses, claims, draft.size.nodes)
    return (Reason.INVALID_DATA, problem) if problem else None


def _claims(draft: Draft, resolution: Resolution) -> Why | None:
    uses, claims = _uses(draft, resolution)
    problem = missing(uses, claims)
    return (Reason.WAITING_FOR_CLAIM, problem) if problem else None


def _uses(draft: Draft, resolution: Resolution) -> tuple[tuple[Use, ...], dict[str, Object | None]]:
    """What the pods mount, and what is known of it."""
    job = draft.job
    found = [(f"input {name}", claim_of(source.uri), False) for name, source in resolution.inputs.items()]
    found.append(("spec.output.uri", claim_of(job.spec.output.uri), True))
    uses = tuple(Use(field, claim, written) for field, claim, written in found if claim is not None)
    return uses, {use.claim: job.related(claim_key(job.namespace, use.claim)) for use in uses}


def _leftovers(draft: Draft) -> Why | None:
    """Two attempts never run at once: they would fight for the accelerators."""
    if any(text(job, "metadata", "name") != _reporter_name(draft, job) for job in draft.job.children(JOB.kind)):
        return Reason.RESTARTING, "the Job of the attempt before is being deleted"
    if running(draft, draft.job.children("Pod")):
        return Reason.RESTARTING, "the pods of the attempt before are ending"
    return None


def _reporter_name(draft: Draft, job: Any) -> str:
    return draft.job.report_name(attempt_of(job))


def _backoff(draft: Draft) -> Why | None:
    last = draft.last
    if last is None or last.ended_at is None:
        return None
    starts_at = last.ended_at + backoff(draft.status)
    if starts_at <= draft.now:
        return None
    draft.wake(starts_at)
    return Reason.RESTARTING, f"the next attempt starts at {starts_at:%Y-%m-%dT%H:%M:%SZ}"


def _start(draft: Draft, resolution: Resolution) -> None:
    job = draft.job
    attempt = Attempt(
        number=draft.status.attempt + 1,
        started_at=draft.now,
        gpus=draft.size.gpus,
        cost_per_hour=draft.cost_per_hour,
    )
    draft.add(attempt)
    lineage = {name: found.digest for name, found in resolution.inputs.items()}
    draft.set(
        start_time=draft.status.start_time or draft.now,
        lineage={**draft.status.lineage, **lineage, "config": children.config_digest(job, resolution.inputs)},
        inputs={name: ArtifactStatus(uri=i.uri, digest=i.digest) for name, i in resolution.inputs.items()},
        pod_template_digest=digest_of(job.spec.trainer.pod_template),
    )
    _make_children(draft, attempt, resolution)


def _make_children(draft: Draft, attempt: Attempt, resolution: Resolution) -> None:
    """What of the attempt's children is missing; the Job only if it has never been there."""
    name = draft.job.attempt_name(attempt.number)
    if all(draft.job.child(resource.kind, name) is not None for resource in (CONFIG_MAP, SERVICE, JOB)):
        return
    for child in children.of_attempt(draft.job, attempt.number, resolution.inputs, draft.size):
        if child["kind"] != JOB.kind or not attempt.job_uid:
            draft.create(child)


def clean_up(draft: Draft) -> None:
    """Deletes the children of attempts that have ended: their outcome is in the status."""
    if draft.ended is not None:
        return  # the pods and their logs stay for the time to live
    current = draft.open.number if draft.open is not None else 0
    for resource in (JOB, SERVICE, CONFIG_MAP):
        for child in draft.job.children(resource.kind):
            if attempt_of(child) != current:
                draft.delete(resource, child)


def refused(draft: Draft) -> Why | None:
    """What the API server could not check."""
    job, spec = draft.job, draft.job.spec
    try:
        Volume.parse(spec.output.uri)
    except BadUri as bad:
        return Reason.INVALID_DATA, f"spec.output.uri: {bad}"
    if name := taken_env(spec):
        return Reason.INVALID_DATA, f"spec.trainer.podTemplate sets {name}, which the operator sets: remove it"
    if scratch_is_a_claim(spec.trainer.pod_template):
        return (
            Reason.INVALID_DATA,
            "spec.trainer.podTemplate makes a claim the volume scratch, which pods would share: use ephemeral, which "
            "makes a claim for each pod",
        )
    size = draft.size  # reads the output's URI
    field, batch, parts = job.kind.batch(spec)
    if batch % (size.world_size * parts) != 0:
        pieces = f"the world size of {size.world_size}" + (f" times {parts}" if parts > 1 else "")
        return Reason.INVALID_DATA, f"{field} of {batch} is not divisible by {pieces}"
    prices = job.observed.settings.prices
    if spec.budget is not None and spec.budget.cost_usd is not None and size.cost_per_hour(prices) is None:
        missing = ", ".join(size.unpriced(prices)) or "a request in trainer.resourcesPerNode"
        return Reason.NO_PRICE, f"spec.budget.costUSD needs prices in the operator's configuration for: {missing}"
    return None


def _drifted(draft: Draft) -> Why | None:
    """podTemplate changed under a running attempt: CEL cannot see inside it, so it is refused here."""
    digest = draft.status.pod_template_digest
    last = draft.last
    if draft.job.spec.suspend or digest is None or last is None or last.action == "Suspend":
        return None
    if digest == digest_of(draft.job.spec.trainer.pod_template):
        return None
    return Reason.DIGEST_MISMATCH, (
        "spec.trainer.podTemplate changed while the job runs; the running attempt keeps the old one and no other "
        "starts: put it back, or suspend the job to change it"
    )
