"""The gate of a reward model: tri-state verdicts on held-out pairs and trusted human scores, decided on bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rlhf_trainer.algos.bradley_terry import fit_temperature
from rlhf_trainer.config import RewardModelValidation
from rlhf_trainer.evals.stats import Interval, clustered_mean, needed_for_margin, spearman
from rlhf_trainer.evals.verdicts import verdict_on
from rlhf_trainer.randomness import Stream, generator
from rlhf_trainer.wire import Verdict, VerdictState

Floats = npt.NDArray[np.float64]

_BINS = 10
_RESAMPLES = 1000
_MIN_PAIRS = 30
_MIN_SCORES = 10


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs: reward differences [N] (raw log-odds), label probabilities of a [N], and prompts [N]."""

    delta: Floats
    probability_a: Floats
    prompts: tuple[str, ...]

    @property
    def decided(self) -> npt.NDArray[np.bool_]:
        return np.not_equal(self.probability_a, 0.5)

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> HeldOut:
        chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return HeldOut(self.delta[chosen], self.probability_a[chosen], tuple(self.prompts[index] for index in chosen))


def cross_fitted_probabilities(pairs: HeldOut, calibrate: bool, seed: int) -> Floats:
    """Predicted probability of a for every pair [N], each from a temperature fitted on the other half of the prompts.

    So no pair judges a temperature that it helped to fit, and all of them count.
    """
    if not calibrate:
        return _sigmoid(pairs.delta)
    names = sorted(set(pairs.prompts))
    shuffled = generator(seed, Stream.SPLIT).permutation(len(names))
    first_half = {names[index] for index in shuffled[: len(names) // 2]}
    side = np.array([prompt in first_half for prompt in pairs.prompts])
    predicted = np.empty_like(pairs.delta)
    for scored in (side, ~side):
        fitted = pairs.take(~scored)
        predicted[scored] = _sigmoid(pairs.delta[scored] / temperature(fitted))
    return predicted


def temperature(pairs: HeldOut) -> float:
    """The calibrating temperature of these pairs; 1 where there are none."""
    if not len(pairs.delta):
        return 1.0
    return fit_temperature(torch.from_numpy(pairs.delta), torch.from_numpy(pairs.probability_a))


def calibration_error(predicted: Floats, observed: Floats) -> float:
    """Expected calibration error: mean |mean prediction - mean label| over 10 bins of equal mass, weighted by size."""
    gaps = np.bincount(_bins(predicted), weights=predicted - observed, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(predicted))


def calibration_interval(predicted: Floats, observed: Floats, prompts: Sequence[str], seed: int) -> Interval:
    """ECE with a 95% interval from a bootstrap over prompts, bin edges kept.

    Binning noise pushes ECE up, and resampling pushes it up again, so the basic interval (2 x estimate - quantiles)
    is used, which takes about that bias out; percentiles would add it once more.
    """
    estimate = calibration_error(predicted, observed)
    _, cluster = np.unique(np.array(prompts), return_inverse=True)
    count = int(cluster.max()) + 1
    gaps = np.zeros((count, _BINS))  # what each prompt contributes to each bin
    np.add.at(gaps, (cluster, _bins(predicted)), predicted - observed)
    drawn = generator(seed, Stream.EVALUATION).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    resampled = np.abs(drawn @ gaps).sum(axis=1) / (drawn @ np.bincount(cluster))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(len(predicted), estimate, max(0.0, 2 * estimate - high), max(0.0, 2 * estimate - low))


def _bins(predicted: Floats) -> npt.NDArray[np.intp]:
    """Bin number of each prediction [N]: equal mass, by rank."""
    bins = np.empty(len(predicted), dtype=np.intp)
    for index, rows in enumerate(np.array_split(np.argsort(predicted, kind="stable"), _BINS)):
        bins[rows] = index
    return bins


def accuracy_verdict(pairs: HeldOut, threshold: float) -> Verdict:
    """Pass: the 95% interval (clustered by prompt) of pairwise accuracy, ties excluded, lies above the threshold."""
    decided = pairs.take(pairs.decided)
    if len(decided.delta) < _MIN_PAIRS:
        return _too_few("accuracy", len(decided.delta), _MIN_PAIRS, threshold, "held-out pairs that are not ties")
    correct = (decided.delta > 0) == (decided.probability_a > 0.5)
    interval = clustered_mean([float(value) for value in correct], list(decided.prompts))
    return _at_least("accuracy", interval, threshold)


def calibration_verdict(pairs: HeldOut, threshold: float, calibrate: bool, seed: int) -> Verdict:
    """Pass: the upper 95% bound of the cross-fitted ECE lies below the threshold. Ties are excluded: a rater who
    sees no difference says nothing about how often a confident prediction is right."""
    decided = pairs.take(pairs.decided)
    if len(decided.delta) < 2 * _MIN_PAIRS:
        return _too_few("calibrationError", len(decided.delta), 2 * _MIN_PAIRS, threshold, "held-out pairs")
    # Bins of P(first text wins) would fold over if all labels were "a"; orient each pair by its prediction instead.
    predicted = cross_fitted_probabilities(decided, calibrate, seed)
    confident = np.maximum(predicted, 1 - predicted)
    right = np.where(predicted >= 0.5, decided.probability_a, 1 - decided.probability_a)
    interval = calibration_interval(confident, right, decided.prompts, seed)
    if interval.upper <= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.lower > threshold else VerdictState.NEED_MORE_DATA
    return _verdict("calibrationError", state, interval, threshold, "at most")


def correlation_verdict(rewards: Sequence[float], scores: Sequence[float], threshold: float) -> Verdict:
    """Pass: the lower 95% bound of Spearman's correlation of rewards with trusted scores reaches the threshold."""
    if len(rewards) < _MIN_SCORES:
        return _too_few("humanCorrelation", len(rewards), _MIN_SCORES, threshold, "human scores")
    return _at_least("humanCorrelation", spearman(rewards, scores), threshold)


def judge(
    pairs: HeldOut,
    human: tuple[Sequence[float], Sequence[float]] | None,
    validation: RewardModelValidation,
    calibrate: bool,
    seed: int,
) -> tuple[Verdict, ...]:
    """All verdicts of the gate; ``human`` is (rewards, scores) of the scored responses."""
    verdicts = [
        accuracy_verdict(pairs, validation.min_accuracy),
        calibration_verdict(pairs, validation.max_calibration_error, calibrate, seed),
    ]
    if validation.human_scores is not None:
        rewards, scores = human or ([], [])
        verdicts.append(correlation_verdict(rewards, scores, validation.human_scores.min_correlation))
    return tuple(verdicts)


def _at_least(metric: str, interval: Interval, threshold: float) -> Verdict:
    if interval.lower >= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.upper < threshold else VerdictState.NEED_MORE_DATA
    return _verdict(metric, state, interval, threshold, "at least")


def _verdict(metric: str, state: VerdictState, interval: Interval, threshold: float, relation: str) -> Verdict:
    needed = needed_for_margin(interval, threshold) if state is VerdictState.NEED_MORE_DATA else None
    found = f"{interval.estimate:.3f} [{interval.lower:.3f}, {interval.upper:.3f}] of n={interval.n}"
    return verdict_on(interval, metric, state, threshold, needed, f"{found}, {relation} {threshold:g} is asked")


def _too_few(metric: str, n: int, minimum: int, threshold: float, what: str) -> Verdict:
    return Verdict(
        metric=metric,
        state=VerdictState.NEED_MORE_DATA,
        n=n,
        threshold=threshold,
        needed=minimum - n,
        message=f"{n} {what}, at least {minimum} are needed for any verdict",
    )


def _sigmoid(values: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * values))
