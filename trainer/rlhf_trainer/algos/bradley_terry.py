"""Bradley-Terry preference learning (Bradley and Terry 1952): pure tensor functions.

A pair's score difference ``delta = r(a) - r(b)`` is the log-odds that a is preferred. Labels are probabilities of a:
1, 0, or one half for a tie; anything between is a soft label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def preference_loss(score_a: Tensor, score_b: Tensor, probability_a: Tensor, centering: float = 0.0) -> Tensor:
    """Mean negative log-likelihood (nats) over pairs [B], plus ``centering`` times the mean squared score sum.

    Scores are only determined up to a constant; the second term pins it near zero (Eisenstein et al. 2023).
    """
    delta = score_a.float() - score_b.float()
    likelihood = functional.binary_cross_entropy_with_logits(delta, probability_a.float())
    return likelihood + centering * (score_a.float() + score_b.float()).square().mean()


def accuracy(delta: Tensor, probability_a: Tensor) -> tuple[float, int]:
    """Share of pairs ranked as labelled, and how many had a label to agree with (ties have none)."""
    decided = probability_a != 0.5
    count = int(decided.sum())
    correct = ((delta > 0) == (probability_a > 0.5)) & decided
    return (float(correct.sum()) / count if count else 0.0), count


def fit_temperature(delta: Tensor, probability_a: Tensor, iterations: int = 50) -> float:
    """The T > 0 that makes ``sigmoid(delta / T)`` most likely (Guo et al. 2017, for two classes).

    The loss is convex in 1/T, so Newton's method from T = 1 finds its only minimum; 1/T is kept within [1e-3, 1e3]:
    scores that order nothing end at the flattest, separable ones at the sharpest temperature.
    """
    delta, probability_a = delta.double(), probability_a.double()
    inverse = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(iterations):
        predicted = torch.sigmoid(inverse * delta)
        gradient = ((predicted - probability_a) * delta).mean()
        curvature = (predicted * (1 - predicted) * delta.square()).mean()
        # A step of at most a factor of two keeps Newton from overshooting where the curve is nearly straight.
        proposed = inverse - gradient / curvature.clamp_min(1e-12)
        updated = proposed.clamp(min=float(inverse) / 2, max=float(inverse) * 2).clamp(1e-3, 1e3)
        if abs(float(updated - inverse)) < 1e-12 * float(inverse):
            break
        inverse = updated
    return 1.0 / float(inverse)
