"""Lagrange multipliers of constraints on mean costs (Ray et al. 2019; Dai et al. 2023, arXiv 2310.12773).

Maximise E[r] subject to E[c_i] <= d_i: the policy maximises (r - sum lambda_i c_i) / (1 + sum lambda_i), every
multiplier climbs its constraint's excess. Where both rest, the policy is the constrained optimum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


def penalised(rewards: Tensor, costs: Sequence[Tensor], multipliers: Sequence[float]) -> Tensor:
    """(rewards - sum lambda_i c_i) / (1 + sum lambda_i); the divisor keeps targets and gradients of one size while the
    multipliers grow, and changes no optimum."""
    total = rewards
    for cost, multiplier in zip(costs, multipliers, strict=True):
        total = total - multiplier * cost
    return total / (1.0 + sum(multipliers))


@dataclass
class Multiplier:
    """Projected dual ascent on the mean cost of the latest ``window`` responses:
    lambda <- clip(lambda + learning_rate (mean - limit), 0, maximum).

    The window makes the step independent of how few responses a training step has; its whole state is ``value`` and
    ``costs``.
    """

    value: float
    limit: float
    learning_rate: float
    maximum: float
    window: int
    costs: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.costs = deque(maxlen=self.window)

    @property
    def mean_cost(self) -> float:
        """Of the window; the limit before anything was seen."""
        return sum(self.costs) / len(self.costs) if self.costs else self.limit

    @property
    def unsatisfied(self) -> bool:
        """At its cap and still too costly: no price in reach buys the constraint."""
        return self.value >= self.maximum and self.mean_cost > self.limit

    def update(self, costs: Sequence[float]) -> None:
        """``costs``: of each response of the step just taken."""
        self.costs.extend(costs)
        risen = self.value + self.learning_rate * (self.mean_cost - self.limit)
        self.value = min(self.maximum, max(0.0, risen))
