"""Bradley-Terry preference learning (Bradley and Terry 1952): pure tensor functions.

A pair's score difference ``delta = r(a) - r(b)`` is the log-odds that a is preferred. Labels are probabilities of a:
1, 0, or one half for a tie; anything between is a soft label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def preference_loss(
    score_a: Tensor,
    score_b: Tensor,
    probability_a: Tensor,
    centering: float = 0.0,
    margin: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood (nats) over pairs [B], plus ``centering`` times the mean squared score sum.

    ``margin`` [B], in reward units, is asked on top (Touvron et al. 2023, section 3.2.2): -log sigmoid(r_chosen -
    r_rejected - m). A soft label p asks for m(2p - 1), so that the minimum lies at logit(p) + m(2p - 1) and a tie asks
    for none. Scores are only determined up to a constant; centering pins it near zero (Eisenstein et al. 2023).
    """
    likelihood = pair_losses(score_a, score_b, probability_a, margin).mean()
    return likelihood + centering * (score_a.float() + score_b.float()).square().mean()


def pair_losses(score_a: Tensor, score_b: Tensor, probability_a: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood (nats) of each pair [B]; see ``preference_loss``."""
    label = probability_a.float()
    delta = score_a.float() - score_b.float()
    if margin is not None:
        delta = delta - margin.float() * (2 * label - 1)
    return functional.binary_cross_entropy_with_logits(delta, label, reduction="none")


def aspect_loss(delta: Tensor, probability_a: Tensor, weight: Tensor) -> Tensor:
    """Bradley-Terry loss of the aspect heads: differences, labels and row weights are [..., B, A].

    A pair trains an aspect only where it was ordered there: elsewhere its weight is 0 (and its label ignored). With
    weight B / (pairs that order the aspect) elsewhere, the mean over rows is the mean over those pairs; the aspects
    together weigh as much as the overall head (the mean is over aspects too).
    """
    losses = functional.binary_cross_entropy_with_logits(delta.float(), probability_a.float(), reduction="none")
    return (losses * weight).mean()


def accuracy(delta: Tensor, probability_a: Tensor) -> tuple[float, int]:
    """Share of pairs ranked as labelled, and how many had a label to agree with (ties have none). Equal scores are
    half right: otherwise a model without an opinion would be as right as one side of the data is often the better."""
    decided = probability_a != 0.5
    count = int(decided.sum())
    agreement = delta.sign() * (2 * probability_a - 1).sign()
    return (float((0.5 + 0.5 * agreement)[decided].mean()) if count else 0.0), count


def fit_temperature(delta: Tensor, probability_a: Tensor, iterations: int = 50) -> float:
    """The T > 0 that makes ``sigmoid(delta / T)`` most likely (Guo et al. 2017, for two classes).

    The loss is convex in 1/T, so Newton's method from T = 1 finds its only minimum. 1/T is kept within [1e-3, 1e3],
    which also holds steps back where the curve is nearly straight; scores that order nothing end at the flattest,
    separable ones at the sharpest temperature.
    """
    delta, probability_a = delta.double(), probability_a.double()
    inverse = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(iterations):
        predicted = torch.sigmoid(inverse * delta)
        gradient = ((predicted - probability_a) * delta).mean()
        curvature = (predicted * (1 - predicted) * delta.square()).mean()
        updated = (inverse - gradient / curvature.clamp_min(1e-12)).clamp(1e-3, 1e3)
        if abs(float(updated - inverse)) < 1e-12 * float(inverse):
            break
        inverse = updated
    return 1.0 / float(inverse)
