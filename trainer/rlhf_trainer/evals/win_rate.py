"""Win rate of one policy's replies over another's: both orders, ties half, clustered by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from rlhf_trainer.evals.stats import Interval, clustered_mean


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


def length_controlled_win_rate(results: Sequence[float], lengths: Sequence[float], others: Sequence[float]) -> float:
    """Win rate at equal length (after Dubois et al. 2024): the logistic fit of ``results`` on a constant and the
    difference of lengths (tokens), read off at zero difference. A figure beside the win rate, not a verdict.

    The difference goes in as tanh of its standardised value, so that one very long reply does not lead, and a ridge of
    one pair's weight keeps separable results finite. Equal lengths give the win rate itself.
    """
    won = np.asarray(results, dtype=np.float64)
    difference = np.asarray(lengths, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    spread = float(np.sqrt(np.mean(difference**2)))
    if spread == 0.0:
        return float(won.mean())
    design = np.stack([np.ones_like(won), np.tanh(difference / spread)], axis=1)
    ridge, beta = np.diag([0.0, 1.0]), np.zeros(2)
    # A constant needs finite odds: the mean is kept half a result away from 0 and 1.
    won = np.clip(won, 0.5 / len(won), 1 - 0.5 / len(won))
    for _ in range(50):
        predicted = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (won - predicted) - ridge @ beta
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + ridge
        move = np.linalg.solve(curvature, gradient)
        beta = beta + np.clip(move, -2.0, 2.0)
        if float(np.abs(move).max()) < 1e-10:
            break
    return float(1 / (1 + np.exp(-beta[0])))
