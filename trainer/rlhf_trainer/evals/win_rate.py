"""Win rate of one policy's replies over another's: both orders, ties half, clustered by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
