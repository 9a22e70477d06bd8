"""Win rate of one policy's replies over another's: both orders, ties half, clustered by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlhf_trainer.evals.stats import (
    Interval,
    cluster_sums,
    cluster_variance,
    clustered_mean,
    effective_groups,
    robust_proportion,
)

Floats = npt.NDArray[np.float64]


class PairJudge(Protocol):
    """Prefers one of two replies: per prompt 1 for the first, 0 for the second, ½ for neither."""

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True)
class RewardJudge:
    """Prefers the higher reward; differences within ``tie_band`` are ties. Blind to order by construction."""

    score: Callable[[Sequence[str], Sequence[str]], tuple[Tensor, Tensor]]
    tie_band: float = 1e-6

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        gaps = (self.score(prompts, first)[0] - self.score(prompts, second)[0]).tolist()
        return [0.5 if abs(gap) <= self.tie_band else float(gap > 0) for gap in gaps]


def outcomes(judge: PairJudge, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> list[float]:
    """Each prompt's result for us in [0, 1], averaged over both orders, so that a judge's bias to a place cancels."""
    ahead = judge(prompts, ours, theirs)
    behind = judge(prompts, theirs, ours)
    return [(first + 1.0 - second) / 2 for first, second in zip(ahead, behind, strict=True)]


def win_rate(results: Sequence[float], prompts: Sequence[str]) -> Interval:
    """Mean result with its 95 % interval; several replies to one prompt are one cluster."""
    return clustered_mean(results, prompts)


def length_controlled_win_rate(
    results: Sequence[float], lengths: Sequence[float], others: Sequence[float], prompts: Sequence[str]
) -> Interval:
    """Win rate at equal length (after Dubois et al. 2024): the logistic fit of ``results`` on a constant and the
    difference of lengths (tokens), read off at zero difference, with its 95 % interval clustered by prompt.

    The difference goes in as tanh of its standardised value, so that one very long reply does not lead, and a ridge of
    one pair's weight keeps separable results finite. Equal lengths give the win rate itself.
    """
    won = np.asarray(results, dtype=np.float64)
    difference = np.asarray(lengths, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    spread = float(np.sqrt(np.mean(difference**2)))
    if spread == 0.0:
        return win_rate(results, prompts)
    design = np.stack([np.ones_like(won), np.tanh(difference / spread)], axis=1)
    # A constant needs finite odds: the mean is kept half a result away from 0 and 1.
    won = np.clip(won, 0.5 / len(won), 1 - 0.5 / len(won))
    beta = _logistic_fit(design, won)
    predicted = _sigmoid(design @ beta)
    bread = np.linalg.inv(_curvature(design, predicted))
    # Sandwich of the fit's scores summed by prompt; the odds at zero difference are its first coefficient.
    sums = cluster_sums(design * (won - predicted)[:, None], prompts)
    variance = float((bread @ cluster_variance(sums) @ bread)[0, 0])
    rate = float(_sigmoid(beta[0]))
    return robust_proportion(rate, (rate * (1 - rate)) ** 2 * variance, effective_groups(prompts), len(won))


_RIDGE = np.diag([0.0, 1.0])


def _logistic_fit(design: Floats, won: Floats) -> Floats:
    """Coefficients [2] by Newton's method, the second under a ridge."""
    beta: Floats = np.zeros(2)
    for _ in range(50):
        predicted = _sigmoid(design @ beta)
        gradient = design.T @ (won - predicted) - _RIDGE @ beta
        move = np.linalg.solve(_curvature(design, predicted), gradient)
        beta = beta + np.clip(move, -2.0, 2.0)
        if float(np.abs(move).max()) < 1e-10:
            break
    return beta


def _curvature(design: Floats, predicted: Floats) -> Floats:
    found: Floats = (design * (predicted * (1 - predicted))[:, None]).T @ design + _RIDGE
    return found


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 0.5 * (1.0 + np.tanh(0.5 * values))
    return found
