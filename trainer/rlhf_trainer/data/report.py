"""The label-quality report: can these labels be trusted, and if not, whose fault is it.

Careless raters can agree very well with each other, so agreement alone proves nothing: the verdict asks for agreement
and for gold items, each on its lower bound.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.data import pii
from rlhf_trainer.data.agreement import (
    Label,
    Metric,
    krippendorff_alpha,
    mean_cohen_kappa,
    noise_ceiling,
    raw_agreement,
)
from rlhf_trainer.data.annotation import Annotation
from rlhf_trainer.data.comparisons import model_verdicts
from rlhf_trainer.data.dawid_skene import Aggregate, dawid_skene, majority
from rlhf_trainer.data.findings import Finding
from rlhf_trainer.data.raters import RaterReport, gini, interval_dict, rater_reports
from rlhf_trainer.data.rows import UNKNOWN
from rlhf_trainer.data.text import normal
from rlhf_trainer.evals.stats import Interval, clustered_mean, needed_for_margin
from rlhf_trainer.wire import Verdict, VerdictState

VALUES = {"a": 1.0, "tie": 0.5, "b": 0.0}
_MIN_GROUP = 20  # labels below which a group's figures are not shown
_MIN_GOLD = 30


@dataclass(frozen=True)
class Thresholds:
    """What the lower bounds must reach. 0.6 is the target many teams write down; few data sets reach it."""

    min_agreement: float = 0.4
    warn_agreement: float = 0.6
    min_pairs: int = 200  # labelled twice: below it the interval of alpha is no evidence
    min_gold_accuracy: float = 0.7


@dataclass(frozen=True)
class QualityReport:
    annotations: int
    pairs: int
    alpha: Interval | None
    kappa: Interval | None
    raw: tuple[int, float] | None
    groups: dict[str, dict[str, tuple[int, float]]]  # raw agreement by strength, cohort, task, language
    gold: Interval | None
    raters: list[RaterReport]
    aggregate: Aggregate
    flips: int
    tie_share: float
    without_rater: int
    without_order: int
    pii: Counter[str]
    verdicts: tuple[Verdict, ...]
    models: tuple[Verdict, ...]  # who people prefer; says nothing about whether labels can be trusted
    findings: list[Finding]

    @property
    def trusted(self) -> Verdict:
        return self.verdicts[-1]


def build_report(
    annotations: Sequence[Annotation], findings: list[Finding], thresholds: Thresholds | None = None, seed: int = 0
) -> QualityReport:
    """Everything about the labels; rows of both_bad count as annotations and order nothing."""
    thresholds = thresholds or Thresholds()
    labels = labels_of(annotations)
    gold_truth = {each.pair_id: VALUES[each.gold_choice] for each in annotations if each.gold_choice is not None}
    aggregate = dawid_skene(labels, gold_truth)
    vote = majority(labels)
    named = [label for label in labels if not isinstance(label.rater, tuple)]
    alpha, gold = krippendorff_alpha(labels, Metric.ORDINAL, seed), gold_accuracy(annotations)
    verdicts = (agreement_verdict(alpha, thresholds), gold_verdict(gold, thresholds))
    return QualityReport(
        annotations=len(annotations),
        pairs=len(vote),
        alpha=alpha,
        kappa=mean_cohen_kappa(named, seed),
        raw=raw_agreement(labels),
        groups=grouped_agreement(annotations),
        gold=gold,
        raters=rater_reports(annotations, aggregate.skill),
        aggregate=aggregate,
        flips=sum((vote[unit] - 0.5) * (p - 0.5) < 0 for unit, p in aggregate.probability.items()),
        tie_share=sum(each.preference == "tie" for each in annotations) / max(1, len(annotations)),
        without_rater=sum(not each.has_rater for each in annotations),
        without_order=sum(each.shown_first is None for each in annotations),
        pii=count_pii(annotations),
        verdicts=(*verdicts, trusted_verdict(verdicts)),
        models=model_verdicts(annotations),
        findings=findings,
    )


def labels_of(annotations: Sequence[Annotation]) -> list[Label]:
    """Labels in canonical order. A row without a rater counts as a rater of its own: agreement needs no names."""
    return [
        Label(
            each.pair_id,
            each.rater_id if each.has_rater else (UNKNOWN, each.row),
            VALUES[each.choice],
            normal(each.prompt),
        )
        for each in annotations
        if each.choice in VALUES
    ]


def gold_accuracy(annotations: Sequence[Annotation]) -> Interval | None:
    """Share of gold items answered right, with a 95% interval clustered by prompt."""
    asked = [each for each in annotations if each.gold_preference is not None]
    if not asked:
        return None
    right = [float(each.preference == each.gold_preference) for each in asked]
    return clustered_mean(right, [normal(each.prompt) for each in asked])


def grouped_agreement(annotations: Sequence[Annotation]) -> dict[str, dict[str, tuple[int, float]]]:
    """Raw agreement within groups of annotations; groups with fewer than 20 comparisons are left out."""
    keys: dict[str, Callable[[Annotation], str | None]] = {
        "strength": lambda each: None if each.strength is None else f"{each.strength:.0f}",
        "cohort": lambda each: each.cohort,
        "task": lambda each: each.task,
        "language": lambda each: each.language,
    }
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for name, key in keys.items():
        members: dict[str, list[Annotation]] = defaultdict(list)
        for each in annotations:
            value = key(each)
            if value is not None and value != UNKNOWN:
                members[value].append(each)
        shares = {value: raw_agreement(labels_of(own)) for value, own in sorted(members.items())}
        shown = {value: share for value, share in shares.items() if share is not None and share[0] >= _MIN_GROUP}
        if shown:
            found[name] = shown
    return found


def count_pii(annotations: Sequence[Annotation]) -> Counter[str]:
    """Values of each kind in the distinct texts."""
    texts = {text for each in annotations for text in (each.prompt, each.response_a, each.response_b)}
    return Counter(span.kind for text in texts for span in pii.find(text))


def agreement_verdict(alpha: Interval | None, thresholds: Thresholds) -> Verdict:
    """Pass: the lower bound of alpha on at least ``min_pairs`` doubly labelled pairs reaches the threshold."""
    name, floor = "labelAgreement", thresholds.min_agreement
    if alpha is None or alpha.n < thresholds.min_pairs:
        n = 0 if alpha is None else alpha.n
        return _too_few(name, n, thresholds.min_pairs, floor, "pairs labelled by two raters", alpha)
    verdict = _at_least(name, alpha, floor, "Krippendorff's alpha")
    if verdict.state is VerdictState.PASS and alpha.lower < thresholds.warn_agreement:
        note = f"{verdict.message}; the target of {thresholds.warn_agreement:g} is not reached"
        return verdict.model_copy(update={"message": note})
    return verdict


def gold_verdict(gold: Interval | None, thresholds: Thresholds) -> Verdict:
    """Pass: the lower bound of the accuracy on gold items reaches the threshold."""
    name, floor = "goldAccuracy", thresholds.min_gold_accuracy
    if gold is None or gold.n < _MIN_GOLD:
        return _too_few(name, 0 if gold is None else gold.n, _MIN_GOLD, floor, "answers to gold items", gold)
    return _at_least(name, gold, floor, "accuracy on gold items")


def trusted_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Pass when all pass, Fail when one fails; n and needed are those of the verdict that decides."""
    order = (VerdictState.FAIL, VerdictState.UNKNOWN, VerdictState.NEED_MORE_DATA, VerdictState.PASS)
    worst = min(verdicts, key=lambda verdict: order.index(verdict.state))
    return worst.model_copy(update={"metric": "labelsTrusted", "message": f"{worst.metric}: {worst.message}"})


def _at_least(metric: str, interval: Interval, floor: float, what: str) -> Verdict:
    if interval.lower >= floor:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.upper < floor else VerdictState.NEED_MORE_DATA
    needed = needed_for_margin(interval, floor) if state is VerdictState.NEED_MORE_DATA else None
    missing = f"; about {needed} more would decide" if needed else ""
    message = (
        f"{what} {interval.estimate:.3f} [{interval.lower:.3f}, {interval.upper:.3f}], n={interval.n}: "
        f"the lower bound must reach {floor:g}{missing}"
    )
    return _verdict(metric, state, interval, floor, needed, message)


def _too_few(metric: str, n: int, least: int, floor: float, what: str, interval: Interval | None) -> Verdict:
    message = f"{n} {what}, at least {least} are needed"
    return _verdict(metric, VerdictState.NEED_MORE_DATA, interval, floor, least - n, message, n)


def _verdict(
    metric: str,
    state: VerdictState,
    interval: Interval | None,
    floor: float,
    needed: int | None,
    message: str,
    n: int | None = None,
) -> Verdict:
    return Verdict(
        metric=metric,
        state=state,
        n=n if n is not None else interval.n if interval else 0,
        estimate=interval.estimate if interval else None,
        lower=interval.lower if interval else None,
        upper=interval.upper if interval else None,
        threshold=floor,
        needed=needed,
        message=message,
    )


def as_dict(report: QualityReport) -> dict[str, Any]:
    """The report as JSON."""
    raw = report.raw
    sizes = [rater.annotations for rater in report.raters]
    return {
        "annotations": report.annotations,
        "pairs": report.pairs,
        "verdicts": [_as_json(verdict) for verdict in report.verdicts],
        "models": [_as_json(verdict) for verdict in report.models],
        "krippendorffAlpha": interval_dict(report.alpha),
        "meanCohenKappa": interval_dict(report.kappa),
        "rawAgreement": None if raw is None else {"n": raw[0], "share": round(raw[1], 4)},
        "noiseCeiling": None if raw is None else round(noise_ceiling(raw[1]), 4),
        "agreementBy": {
            name: {value: {"n": n, "share": round(share, 4)} for value, (n, share) in own.items()}
            for name, own in report.groups.items()
        },
        "goldAccuracy": interval_dict(report.gold),
        "raters": [rater.as_dict() for rater in report.raters],
        "concentration": {
            "top": round(report.raters[0].share, 4) if report.raters else None,
            "gini": round(gini(sizes), 4),
        },
        "dawidSkene": {
            "rounds": report.aggregate.rounds,
            "converged": report.aggregate.converged,
            "flipsAgainstMajority": report.flips,
        },
        "tieShare": round(report.tie_share, 4),
        "withoutRater": report.without_rater,
        "withoutOrder": report.without_order,
        "pii": dict(sorted(report.pii.items())),
        "piiDetectors": ["structured"],
        "findings": [found.as_dict() for found in report.findings],
    }


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return verdict.model_dump(by_alias=True, exclude_none=True, mode="json")
