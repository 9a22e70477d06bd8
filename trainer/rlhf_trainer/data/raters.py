"""One report per rater: gold items, skill, position, pace, consistency; and how the work is spread."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from scipy import special

from rlhf_trainer.data.annotation import Annotation
from rlhf_trainer.evals.stats import Interval, wilson

_BIAS_LEVEL = 0.01  # of the false discovery rate
_BIAS_SIZE = 0.10  # |P(first) - 0.5| beyond which a bias matters


@dataclass(frozen=True)
class RaterReport:
    """What is known of one rater; None where the data cannot say."""

    rater: str
    annotations: int
    share: float
    gold: Interval | None
    skill: float | None
    shown: int  # decided annotations whose order is known
    first: Interval | None  # how often the one shown first won
    first_q: float | None  # Benjamini-Hochberg over raters
    tie_rate: float
    timed: int  # annotations whose duration is known
    seconds: float | None  # median of theirs
    repeats: int  # pairs answered more than once
    consistency: float | None  # share of repeats with the same answer

    @property
    def position_biased(self) -> bool:
        """Significant after Benjamini-Hochberg and large: with many labels a bias of 1% is significant too."""
        return (
            self.first is not None
            and self.first_q is not None
            and self.first_q < _BIAS_LEVEL
            and abs(self.first.estimate - 0.5) > _BIAS_SIZE
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "rater": self.rater,
            "annotations": self.annotations,
            "share": round(self.share, 4),
            "gold": interval_dict(self.gold),
            "skill": None if self.skill is None else round(self.skill, 4),
            "pFirst": interval_dict(self.first),
            "pFirstQ": self.first_q,
            "positionBiased": self.position_biased,
            "tieRate": round(self.tie_rate, 4),
            "medianSeconds": self.seconds,
            "repeats": self.repeats,
            "consistency": self.consistency,
        }


def interval_dict(interval: Interval | None) -> dict[str, float | int] | None:
    if interval is None:
        return None
    return {
        "n": interval.n,
        "estimate": round(interval.estimate, 4),
        "lower": round(interval.lower, 4),
        "upper": round(interval.upper, 4),
    }


def rater_reports(annotations: Sequence[Annotation], skill: Mapping[Hashable, float]) -> list[RaterReport]:
    """Reports of all named raters, most annotations first. Rows without a rater are left out."""
    own: dict[str, list[Annotation]] = defaultdict(list)
    for each in annotations:
        if each.has_rater:
            own[each.rater_id].append(each)
    total = sum(len(rows) for rows in own.values())
    reports = [_report(rater, rows, len(rows) / total, skill.get(rater)) for rater, rows in own.items()]
    biased = [report for report in reports if report.first is not None]
    levels = benjamini_hochberg(
        [binomial_half(round(r.first.estimate * r.shown), r.shown) for r in biased if r.first is not None]
    )
    adjusted = {report.rater: q for report, q in zip(biased, levels, strict=True)}
    reports = [replace(report, first_q=adjusted.get(report.rater)) for report in reports]
    return sorted(reports, key=lambda report: (-report.annotations, report.rater))


def _report(rater: str, rows: Sequence[Annotation], share: float, skill: float | None) -> RaterReport:
    gold = [each.preference == each.gold_preference for each in rows if each.gold_preference is not None]
    first = [each.preference == each.shown_first for each in rows if each.shown_first and each.preference in ("a", "b")]
    seconds = [each.duration_s for each in rows if each.duration_s is not None]
    repeats, consistent = self_consistency(rows)
    return RaterReport(
        rater=rater,
        annotations=len(rows),
        share=share,
        gold=wilson(sum(gold), len(gold)) if gold else None,
        skill=skill,
        shown=len(first),
        first=wilson(sum(first), len(first)) if first else None,
        first_q=None,
        tie_rate=sum(each.preference == "tie" for each in rows) / len(rows),
        timed=len(seconds),
        seconds=median(seconds) if seconds else None,
        repeats=repeats,
        consistency=consistent / repeats if repeats else None,
    )


def self_consistency(rows: Sequence[Annotation]) -> tuple[int, int]:
    """(comparisons of two answers of this rater to one pair, how many of them agree)."""
    answers: dict[str, list[str]] = defaultdict(list)
    for each in rows:
        answers[each.pair_id].append(each.choice)
    comparisons = sum(math.comb(len(given), 2) for given in answers.values())
    return comparisons, sum(math.comb(same, 2) for given in answers.values() for same in Counter(given).values())


def contradictions(rows: Sequence[Annotation]) -> tuple[int, int]:
    """(pairs a rater answered more than once, how many of them with a and with b), over all named raters."""
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for each in rows:
        if each.has_rater:
            answers[each.rater_id, each.pair_id].append(each.choice)
    repeated = [set(given) for given in answers.values() if len(given) > 1]
    return len(repeated), sum({"a", "b"} <= given for given in repeated)


def binomial_half(successes: int, n: int) -> float:
    """Exact two-sided p-value of a fair coin. For p = 1/2 it is twice the smaller tail, at most 1."""
    return min(1.0, 2 * float(special.bdtr(min(successes, n - successes), n, 0.5)))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values that control the false discovery rate (Benjamini and Hochberg 1995)."""
    if not p_values:
        return []
    p = np.asarray(p_values)
    order = np.argsort(p)
    stepped = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1.0)
    q = np.empty_like(adjusted)
    q[order] = adjusted
    return [float(value) for value in q]


def gini(counts: Sequence[int]) -> float:
    """Inequality of the raters' shares: 0 when all did the same, near 1 when one did everything."""
    if not counts:
        return 0.0
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))
