"""One function per condition: what is true of the job, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_operator.api.conditions import JobCondition, Truth, find, is_true
from rlhf_operator.kinds.base import JOB
from rlhf_operator.kinds.training.children import QUEUE_LABEL, TRAINER
from rlhf_operator.kinds.training.draft import Draft
from rlhf_operator.kinds.training.forecast import foreseen
from rlhf_operator.kinds.training.objects import text
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.watching import ready
from rlhf_trainer.wire import FailureClass, Verdict, VerdictState

Judgement = tuple[Truth, Reason, str]
YES, NO, UNKNOWN = Truth.TRUE, Truth.FALSE, Truth.UNKNOWN


def _accepted(draft: Draft) -> Judgement:
    return (NO, *draft.refused) if draft.refused else (YES, Reason.AS_EXPECTED, "the spec can be run")


def _admitted(draft: Draft) -> Judgement:
    attempt = draft.open
    if attempt is None:
        return UNKNOWN, Reason.NOT_YET, "no attempt is under way"
    if attempt.admitted_at is not None:
        return YES, Reason.AS_EXPECTED, f"attempt {attempt.number} may run"
    job = draft.job.child(JOB.kind, draft.job.attempt_name(attempt.number))
    if job is None:
        return UNKNOWN, Reason.NOT_YET, f"the Job of attempt {attempt.number} is being created"
    queue = text(job, "metadata", "labels", QUEUE_LABEL) or "no queue"
    return NO, Reason.WAITING_FOR_QUOTA, f"the Job of attempt {attempt.number} is suspended until {queue} admits it"


def _pods_ready(draft: Draft) -> Judgement:
    attempt = draft.open
    if attempt is None:
        return UNKNOWN, Reason.NOT_YET, "no attempt is under way"
    nodes, seen = draft.size.nodes, len(ready(draft.job.pods(attempt.number, TRAINER)))
    if seen >= nodes:
        return YES, Reason.AS_EXPECTED, f"all {nodes} pods are ready"
    if draft.problem is not None and draft.problem[0] is not Reason.NO_PROGRESS:
        return NO, *draft.problem
    return (
        NO,
        Reason.PODS_STARTING if attempt.ready_at is None else Reason.STOPPING,
        f"{seen} of {nodes} pods are ready",
    )


def _progressing(draft: Draft) -> Judgement:
    attempt, stop = draft.open, _terminal(draft)
    if stop is not None:
        return NO, stop[0], "the job has ended"
    if attempt is not None and attempt.stopping is not None:
        reason = _stop_reason(attempt.stopping) if attempt.action == "Suspend" else Reason.STOPPING
        return NO, reason, f"attempt {attempt.number} is being ended: {attempt.message or attempt.stopping}"
    for why in (draft.waiting, draft.held):
        if why is not None:
            return NO, *why
    if attempt is None:
        return (NO, *draft.refused) if draft.refused else (UNKNOWN, Reason.NOT_YET, "nothing is under way")
    if attempt.failed_at is not None:
        return NO, Reason.RESTARTING, f"attempt {attempt.number} failed and is ending: {attempt.message or ''}"
    if draft.problem is not None:
        return UNKNOWN if draft.problem[0] is Reason.NO_PROGRESS else NO, *draft.problem
    if attempt.running_at is None:
        return UNKNOWN, Reason.NOT_YET, f"attempt {attempt.number} has not reported a training step"
    if (late := foreseen(draft, Reason.DEADLINE_EXCEEDED)) is not None:
        return YES, Reason.WILL_EXCEED_DEADLINE, late
    return YES, Reason.AS_EXPECTED, f"attempt {attempt.number} is training"


def _stop_reason(name: str) -> Reason:
    return Reason(name) if name in set(Reason) else Reason.STOPPING


def _checkpointed(draft: Draft) -> Judgement:
    newest = draft.status.checkpoints[-1] if draft.status.checkpoints else None
    if newest is None:
        return NO, Reason.CHECKPOINT_MISSING, "no checkpoint is known: an attempt would start from the beginning"
    return YES, Reason.AS_EXPECTED, f"the newest checkpoint is of step {newest.step}, attempt {newest.attempt}"


def _guardrails_healthy(draft: Draft) -> Judgement:
    last = draft.last
    breached = [guardrail for guardrail in draft.status.guardrails if guardrail.state == "Breached"]
    paused = last is not None and last.action == "Suspend" and last.released_by is None
    if last is not None and paused and last.failure_class == FailureClass.GUARDRAIL_PAUSED:
        return NO, Reason.GUARDRAIL_BREACHED, last.message or "a guardrail paused the job"
    if last is not None and last.failure_class == FailureClass.GUARDRAIL_STOPPED:
        return NO, Reason.GUARDRAIL_BREACHED, last.message or "a guardrail stopped the job"
    if breached:
        first = breached[0]
        return NO, Reason.GUARDRAIL_BREACHED, f"{first.metric} is out of bounds since step {first.since_step}"
    if draft.status.progress is None:
        return UNKNOWN, Reason.NOT_YET, "no attempt has reported yet"
    return YES, Reason.AS_EXPECTED, "no guardrail is breached"


def _within_budget(draft: Draft) -> Judgement:
    if draft.job.spec.budget is None:
        return YES, Reason.AS_EXPECTED, "no budget is set"
    whys = [draft.held, draft.ended, _latched(draft)]
    attempt = draft.open
    if attempt is not None and attempt.stopping == Reason.BUDGET_EXHAUSTED:
        whys.append((Reason.BUDGET_EXHAUSTED, attempt.message or ""))
    over = next((why for why in whys if why is not None and why[0] is Reason.BUDGET_EXHAUSTED), None)
    if over is not None:
        return NO, *over
    if (dear := foreseen(draft, Reason.BUDGET_EXHAUSTED)) is not None:
        return YES, Reason.WILL_EXHAUST_BUDGET, dear
    return YES, Reason.AS_EXPECTED, "the budget is not used up"


def _validated(draft: Draft) -> Judgement:
    last, waiver, unjudged = draft.last, draft.status.waiver, _unjudged(draft)
    if waiver is not None:
        return YES, Reason.WAIVED, f"{waiver.by} waived the gate for {waiver.digest} by Decision {waiver.decision}"
    if last is not None and last.failure_class == FailureClass.GATE_FAILED:
        return NO, draft.job.kind.gate_reason, _gate_message(draft.status.verdicts) or last.message or "the gate failed"
    if last is not None and last.failure_class == FailureClass.SUCCESS and last.action == "Complete":
        verdicts = draft.status.verdicts
        if verdicts and all(verdict.state is VerdictState.PASS for verdict in verdicts):
            return YES, Reason.AS_EXPECTED, "every gate passed"
        # No judge, an image that judges nothing, or a message that lost its verdicts: success is not evidence.
        why = unjudged or "run it again under another name with a trainer image that judges"
        message = f"the run reports success without a passed verdict, and no evidence is not a pass: {why}"
        return UNKNOWN, Reason.OUTCOME_UNKNOWN, message
    return UNKNOWN, Reason.NOT_YET, unjudged or "no artifact has been judged"


def _unjudged(draft: Draft) -> str:
    job = draft.job
    return "" if job.valid_spec is None else job.kind.unjudged(job.valid_spec)


def _gate_message(verdicts: list[Verdict]) -> str:
    """Which gates were not passed, on what evidence."""
    parts = []
    for verdict in verdicts:
        if verdict.state is VerdictState.PASS:
            continue
        numbers = [f"n={verdict.n}"]
        if verdict.lower is not None and verdict.upper is not None:
            numbers.append(f"interval {verdict.lower:.4g} to {verdict.upper:.4g}")
        if verdict.threshold is not None:
            numbers.append(f"threshold {verdict.threshold:.4g}")
        if verdict.needed is not None:
            numbers.append(f"{verdict.needed} more samples needed")
        parts.append(f"{verdict.metric} is {verdict.state} ({', '.join(numbers)}) {verdict.message}".strip())
    return "; ".join(parts)[:2000]


def _suspended(draft: Draft) -> Judgement:
    return (YES, *draft.held) if draft.held else (NO, Reason.AS_EXPECTED, "the job is not suspended")


def _complete(draft: Draft) -> Judgement:
    end = _terminal(draft)
    if end is not None and end[0] in (Reason.AS_EXPECTED, Reason.WAIVED):
        return YES, *end
    return NO, Reason.NOT_YET if end is None else end[0], "the job has not completed"


def _failed(draft: Draft) -> Judgement:
    end = _terminal(draft)
    if end is not None and end[0] not in (Reason.AS_EXPECTED, Reason.WAIVED):
        return YES, *end
    if draft.refused is not None and draft.open is None and end is None:
        return YES, *draft.refused  # not for good: another spec, or price, lifts it
    return NO, Reason.AS_EXPECTED, "the job has not failed"


def _terminal(draft: Draft) -> tuple[Reason, str] | None:
    """How the job ended: in this pass, or long ago."""
    return draft.ended or _latched(draft)


def _latched(draft: Draft) -> tuple[Reason, str] | None:
    if draft.job.status.completion_time is None:
        return None
    for type in (JobCondition.COMPLETE, JobCondition.FAILED):
        before = find(draft.job.status.conditions, type)
        if before is not None and is_true(draft.job.status.conditions, type) and before.reason in set(Reason):
            return Reason(before.reason), before.message
    return Reason.OUTCOME_UNKNOWN, "the job has ended; how it did is no longer in its status"


JUDGES: dict[JobCondition, Callable[[Draft], Judgement]] = {
    JobCondition.ACCEPTED: _accepted,
    JobCondition.ADMITTED: _admitted,
    JobCondition.PODS_READY: _pods_ready,
    JobCondition.PROGRESSING: _progressing,
    JobCondition.CHECKPOINTED: _checkpointed,
    JobCondition.GUARDRAILS_HEALTHY: _guardrails_healthy,
    JobCondition.WITHIN_BUDGET: _within_budget,
    JobCondition.VALIDATED: _validated,
    JobCondition.SUSPENDED: _suspended,
    JobCondition.COMPLETE: _complete,
    JobCondition.FAILED: _failed,
}
