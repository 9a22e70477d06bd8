"""Is a reward difference the log-odds it claims to be? Expected calibration error and Brier score on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rlhf_trainer.algos.bradley_terry import fit_temperature
from rlhf_trainer.evals.stats import Interval, clustered_mean
from rlhf_trainer.randomness import Stream, generator

Floats = npt.NDArray[np.float64]

_BINS = 10
_RESAMPLES = 1000


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs: reward differences [N] (raw log-odds), label probabilities of a [N], and prompts [N]."""

    delta: Floats
    probability_a: Floats
    prompts: tuple[str, ...]

    @property
    def decided(self) -> npt.NDArray[np.bool_]:
        return np.not_equal(self.probability_a, 0.5)

    @property
    def correct(self) -> Floats:
        """1 where ranked as labelled, 0 where against it, one half for equal scores; without meaning for ties."""
        return 0.5 + 0.5 * np.sign(self.delta) * np.sign(self.probability_a - 0.5)

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


def brier_score(predicted: Floats, observed: Floats, prompts: Sequence[str]) -> Interval:
    """Mean squared error of the predicted probabilities (Brier 1950), with its 95 % interval clustered by prompt: 0 is
    perfect, 0.25 what a coin scores."""
    return clustered_mean(np.square(predicted - observed).tolist(), prompts)


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
    if count < 2:
        return Interval(len(predicted), estimate, 0.0, 1.0)
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


def _sigmoid(values: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * values))
