"""The gate of a reward model: tri-state verdicts on held-out pairs and trusted human scores, decided on bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_trainer.config import RewardModelValidation
from rlhf_trainer.evals.calibration import (
    HeldOut,
    brier_score,
    calibration_interval,
    cross_fitted_probabilities,
)
from rlhf_trainer.evals.probes import ProbeOutcome, pass_rates, probe_verdict
from rlhf_trainer.evals.stats import (
    Interval,
    absolute,
    cluster_draws,
    clustered_mean,
    difference,
    pearson,
    rank_correlation_gap,
    spearman,
)
from rlhf_trainer.evals.verdicts import at_least, at_most, too_few, unknown
from rlhf_trainer.randomness import Stream, generator
from rlhf_trainer.wire import Verdict

_MIN_PAIRS = 30
_MIN_SCORES = 10
_MIN_COHORT = 20  # rows; smaller cohorts are not reported, which also protects their members


@dataclass(frozen=True)
class HumanScored:
    """Trusted scores of single responses: rewards, scores and lengths (tokens) [N], and prompts [N]."""

    rewards: Sequence[float]
    scores: Sequence[float]
    lengths: Sequence[float]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at. ``aspects`` are held-out pairs as each aspect's head and labels see them."""

    pairs: HeldOut
    cohorts: tuple[str, ...] = ()
    human: HumanScored | None = None
    aspects: Mapping[str, HeldOut] = field(default_factory=dict)
    probes: tuple[ProbeOutcome, ...] = ()
    scale: float = 1.0  # standard deviation of the reward on the reference set


def judge(evidence: Evidence, validation: RewardModelValidation, calibrate: bool, seed: int) -> tuple[Verdict, ...]:
    """All verdicts that the configuration asks for; docs/gates.md has a paragraph on each."""
    verdicts = [
        accuracy_verdict("accuracy", evidence.pairs, validation.min_accuracy),
        calibration_verdict(evidence.pairs, validation.max_calibration_error, calibrate, seed),
    ]
    if validation.max_brier_score is not None:
        verdicts.append(brier_verdict(evidence.pairs, validation.max_brier_score, calibrate, seed))
    if validation.human_scores is not None:
        threshold = validation.human_scores.min_correlation
        verdicts += correlation_verdicts(evidence.human, threshold, seed)
    if validation.max_length_bias is not None:
        verdicts.append(length_verdict(evidence.human, validation.max_length_bias, seed))
    if validation.max_cohort_gap is not None:
        verdicts.append(cohort_verdict(evidence.pairs, evidence.cohorts, validation.max_cohort_gap))
    if validation.min_probe_pass_rate is not None:
        verdicts.append(probe_verdict(evidence.probes, evidence.scale, validation.min_probe_pass_rate))
    verdicts += [
        accuracy_verdict(f"aspectAccuracy/{name}", pairs, validation.min_aspect_accuracy)
        for name, pairs in evidence.aspects.items()
    ]
    return tuple(verdicts)


def figures(evidence: Evidence, calibrate: bool, seed: int) -> dict[str, float]:
    """What is worth knowing besides the verdicts, asked for or not."""
    found: dict[str, float] = {}
    decided = evidence.pairs.take(evidence.pairs.decided)
    if len(decided.delta):
        predicted = cross_fitted_probabilities(decided, calibrate, seed)
        found["brierScore"] = brier_score(predicted, decided.probability_a, decided.prompts).estimate
    human = evidence.human
    if human is not None and len(human.scores) >= _MIN_SCORES:
        found["humanPearson"] = pearson(human.rewards, human.scores, _draws(human.prompts, seed, 1)).estimate
        found["lengthBias"] = _length_gap(human, seed, 1).estimate
    gaps = cohort_gaps(evidence.pairs, evidence.cohorts)
    if gaps:
        found["cohortGap"] = max(gap.estimate for gap in gaps.values())
    rates = pass_rates(evidence.probes)
    found |= {f"{probe.value}PassRate": rate.estimate for probe, rate in rates.items()}
    aspects = [accuracy for pairs in evidence.aspects.values() if (accuracy := _accuracy(pairs)) is not None]
    if aspects:
        found["aspectAccuracy"] = min(aspects)
    return found


def accuracy_verdict(metric: str, pairs: HeldOut, threshold: float) -> Verdict:
    """Pass: the 95% interval (clustered by prompt) of pairwise accuracy, ties excluded, lies above the threshold."""
    decided = pairs.take(pairs.decided)
    if len(decided.delta) < _MIN_PAIRS:
        return too_few(metric, len(decided.delta), _MIN_PAIRS, threshold, "held-out pairs that are not ties")
    interval = clustered_mean(decided.correct.tolist(), list(decided.prompts))
    return at_least(metric, interval, threshold, "share of held-out pairs ranked as labelled")


def calibration_verdict(pairs: HeldOut, threshold: float, calibrate: bool, seed: int) -> Verdict:
    """Pass: the upper 95% bound of the cross-fitted ECE lies below the threshold. Ties are excluded: a rater who
    sees no difference says nothing about how often a confident prediction is right."""
    decided = pairs.take(pairs.decided)
    if len(decided.delta) < 2 * _MIN_PAIRS:
        return too_few("calibrationError", len(decided.delta), 2 * _MIN_PAIRS, threshold, "held-out pairs")
    # Bins of P(first text wins) would fold over if all labels were "a"; orient each pair by its prediction instead.
    predicted = cross_fitted_probabilities(decided, calibrate, seed)
    confident = np.maximum(predicted, 1 - predicted)
    right = np.where(predicted >= 0.5, decided.probability_a, 1 - decided.probability_a)
    interval = calibration_interval(confident, right, decided.prompts, seed)
    return at_most("calibrationError", interval, threshold, "confidence must be right as often as it says")


def brier_verdict(pairs: HeldOut, threshold: float, calibrate: bool, seed: int) -> Verdict:
    """Pass: the upper 95% bound of the cross-fitted Brier score lies below the threshold. Unlike the calibration error
    it also asks for confidence: a coin that knows it is one is well calibrated."""
    decided = pairs.take(pairs.decided)
    if len(decided.delta) < 2 * _MIN_PAIRS:
        return too_few("brierScore", len(decided.delta), 2 * _MIN_PAIRS, threshold, "held-out pairs")
    predicted = cross_fitted_probabilities(decided, calibrate, seed)
    interval = brier_score(predicted, decided.probability_a, decided.prompts)
    return at_most("brierScore", interval, threshold, "mean squared error of predicted preferences, 0.25 of a coin")


def correlation_verdicts(human: HumanScored | None, threshold: float, seed: int) -> list[Verdict]:
    """Pass: the lower 95% bounds of Spearman's and of Pearson's correlation with trusted scores reach the threshold."""
    count = 0 if human is None else len(human.scores)
    if human is None or count < _MIN_SCORES:
        return [
            too_few(name, count, _MIN_SCORES, threshold, "human scores")
            for name in ("humanCorrelation", "humanPearson")
        ]
    ranks = spearman(human.rewards, human.scores, clusters=human.prompts)
    linear = pearson(human.rewards, human.scores, _draws(human.prompts, seed))
    return [
        at_least("humanCorrelation", ranks, threshold, "Spearman correlation with trusted scores"),
        at_least("humanPearson", linear, threshold, "Pearson correlation with trusted scores"),
    ]


def length_verdict(human: HumanScored | None, threshold: float, seed: int) -> Verdict:
    """Pass: rewards follow length no more (and no less) than trusted scores of the same responses do, up to the
    threshold. Without trusted scores there is no telling a taste for length from a bias."""
    if human is None:
        return unknown("lengthBias", threshold, "maxLengthBias needs trusted scores; give validation.humanScores")
    if len(human.scores) < _MIN_PAIRS:
        return too_few("lengthBias", len(human.scores), _MIN_PAIRS, threshold, "human scores")
    note = "difference of the rank correlations with length, of rewards and of trusted scores"
    return at_most("lengthBias", _length_gap(human, seed), threshold, note)


def cohort_verdict(pairs: HeldOut, cohorts: Sequence[str], threshold: float) -> Verdict:
    """Pass: no cohort's accuracy differs from that of the rest by more than the threshold; the worst is shown. The
    intervals hold together (Bonferroni over cohorts)."""
    gaps = cohort_gaps(pairs, cohorts)
    if not gaps:
        missing = f"maxCohortGap needs two cohorts with {_MIN_COHORT} held-out pairs each; name cohorts in the rows"
        return unknown("cohortGap", threshold, missing)
    # The one furthest from passing: a small cohort's wide interval must not hide another's sure gap.
    worst = max(gaps, key=lambda name: (gaps[name].lower > threshold, gaps[name].upper, name))
    note = f"worst is cohort {worst!r} of {len(gaps)}, accuracy against the rest"
    return at_most("cohortGap", gaps[worst], threshold, note)


def cohort_gaps(pairs: HeldOut, cohorts: Sequence[str]) -> dict[str, Interval]:
    """cohort → |accuracy - accuracy of the rest|, for cohorts and rests of at least 20 pairs that are not ties."""
    if not cohorts:
        return {}
    decided, of = pairs.decided, np.array(cohorts)
    names = [
        name
        for name in sorted(set(cohorts))
        if min(int((decided & (of == name)).sum()), int((decided & (of != name)).sum())) >= _MIN_COHORT
    ]
    confidence = 1 - 0.05 / max(1, len(names))

    def accuracy(rows: np.typing.NDArray[np.bool_]) -> Interval:
        side = pairs.take(rows)
        return clustered_mean(side.correct.tolist(), list(side.prompts), confidence)

    return {
        name: absolute(difference(accuracy(decided & (of == name)), accuracy(decided & (of != name)))) for name in names
    }


def _accuracy(pairs: HeldOut) -> float | None:
    decided = pairs.take(pairs.decided)
    return float(decided.correct.mean()) if len(decided.delta) else None


def _length_gap(human: HumanScored, seed: int, resamples: int = 1000) -> Interval:
    return rank_correlation_gap(human.rewards, human.scores, human.lengths, _draws(human.prompts, seed, resamples))


def _draws(prompts: Sequence[str], seed: int, resamples: int = 1000) -> np.typing.NDArray[np.int64]:
    return cluster_draws(prompts, generator(seed, Stream.EVALUATION), resamples)
