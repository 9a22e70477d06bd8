"""Evidence: what the gateways counted, folded into the trial, and what the guardrails say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from rlhf_gateway.wire import ArmCounts
from rlhf_operator.analysis import codec, latency
from rlhf_operator.analysis.fold import Counts, Reading, RowName, fold, forget_rows
from rlhf_operator.analysis.trial import Design, Metric, Trial, advanced
from rlhf_operator.analysis.verdict import Judgement, failed, judge, passed
from rlhf_operator.api.policy_rollout import Guardrail, seconds
from rlhf_operator.api.policy_rollout_status import Interval, Revision, RolloutMetric, RolloutVerdict
from rlhf_operator.kinds.policy_rollout.gateway import stage_number
from rlhf_operator.kinds.policy_rollout.observe import View
from rlhf_operator.kinds.training.objects import integer, moment
from rlhf_trainer.wire import VerdictState

WRITE_EVERY = timedelta(seconds=5)  # counts that decide nothing are written no more often


@dataclass(frozen=True)
class Evidence:
    """The trial, and when it was last written."""

    trial: Trial
    number: int  # of the trial it belongs to
    updated_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        written = {"updatedAt": self.updated_at.isoformat().replace("+00:00", "Z")} if self.updated_at else {}
        return {"trial": self.number, **written, **codec.to_json(self.trial)}


def recorded(view: View, number: int) -> Evidence:
    """As the status holds it; another trial's evidence says nothing about this one."""
    data = view.status.evidence
    if integer(data, "trial") != number:
        return Evidence(Trial(), number, None)
    return Evidence(codec.from_json(data), number, moment(data, "updatedAt"))


def gathered(view: View, before: Evidence, stable: Revision, candidate: Revision, stage: int) -> Evidence:
    """With everything that the gateways counted in this stage and the one before it."""
    current = {stage_number(before.number, s): s for s in range(max(0, stage - 1), stage + 1)}
    readings = [
        Reading(pod.uid, pod.evidence.epoch, dict(_rows(pod.evidence.counts, current, stable, candidate)))
        for pod in view.gateway_pods
        if pod.evidence is not None
    ]
    pods, new = fold(before.trial.pods, readings)
    pods = forget_rows(pods, min(current))
    trial = advanced(replace(before.trial, pods=pods), new, designs(view, before.number), _within_limit(view))
    if not new:
        return before
    return Evidence(trial, before.number, view.now)


def _within_limit(view: View) -> int:
    """So many of the gateways' latency buckets hold nothing slower than what users were promised."""
    limits = [g.limit for g in view.spec.guardrails if g.limit is not None]
    bounds = [pod.evidence.latency_bounds_ms for pod in view.gateway_pods if pod.evidence is not None]
    return latency.beyond(1000.0 * seconds(limits[0]), bounds[0]) if limits and bounds else 0


def designs(view: View, number: int) -> dict[int, Design]:
    """How each stage of the trial splits traffic, by the gateway's stage number."""
    return {
        stage_number(number, index): Design.of(stage.weight_percent, stage.shadow)
        for index, stage in enumerate(view.spec.stages)
    }


def _rows(
    counts: tuple[ArmCounts, ...], stages: Mapping[int, int], stable: Revision, candidate: Revision
) -> Iterator[tuple[RowName, Counts]]:
    revisions = {"stable": stable.revision, "canary": candidate.revision}
    for row in counts:
        if row.stage in stages and row.revision == revisions[row.arm]:
            yield (
                RowName(row.stage, row.arm),
                Counts(
                    conversations=row.conversations,
                    failed=row.failed_conversations,
                    judged=row.judged_conversations,
                    violating=row.violating_conversations,
                    harmful_served=row.harmful_served,
                    latency=row.latency_conversation_buckets,
                ),
            )


def crossed(trial: Trial, guardrails: list[Guardrail]) -> Guardrail | None:
    """The first guardrail that the candidate fails."""
    return next((g for g in guardrails if failed(trial, _metric(g.metric), g.margin, g.alpha)), None)


def all_passed(trial: Trial, guardrails: list[Guardrail]) -> bool:
    return all(passed(trial, _metric(g.metric), g.margin, g.alpha) for g in guardrails)


def verdicts(trial: Trial, guardrails: list[Guardrail], design: Design, rate: float | None) -> list[RolloutVerdict]:
    """What every guardrail says; `rate`: candidate conversations per second, for the time that is left."""
    return [_verdict(judge(trial, _metric(g.metric), g.margin, g.alpha, design, g.limit), rate) for g in guardrails]


def states(trial: Trial, guardrails: list[Guardrail]) -> tuple[VerdictState, ...]:
    """In brief: what a status write is worth."""
    return tuple(
        VerdictState.FAIL
        if failed(trial, _metric(g.metric), g.margin, g.alpha)
        else VerdictState.PASS
        if passed(trial, _metric(g.metric), g.margin, g.alpha)
        else VerdictState.NEED_MORE_DATA
        for g in guardrails
    )


def _metric(metric: RolloutMetric) -> Metric:
    return Metric(metric.value)


def _verdict(judgement: Judgement, rate: float | None) -> RolloutVerdict:
    known = judgement.lower is not None and judgement.upper is not None
    return RolloutVerdict(
        metric=RolloutMetric(judgement.metric.value),
        state=judgement.state,
        n=judgement.n,
        candidate_rate=_rounded(judgement.candidate_rate),
        stable_rate=_rounded(judgement.stable_rate),
        estimate=_rounded(judgement.estimate),
        interval=Interval(lower=round(judgement.lower or 0.0, 6), upper=round(judgement.upper or 0.0, 6))
        if known
        else None,
        margin=judgement.margin,
        e_value=float(f"{judgement.e_value:.4g}") if judgement.e_value is not None else None,
        bound=round(judgement.bound, 3),
        needed=judgement.needed,
        eta_seconds=eta(judgement.needed, rate),
        test=judgement.test,
        message=judgement.message,
    )


def eta(needed: int | None, rate: float | None) -> int | None:
    """Seconds until `needed` further conversations; None: at this rate never, or nobody knows the rate."""
    if needed is None or not rate:
        return None
    return min(round(needed / rate), 10**9)


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if value is not None else None
