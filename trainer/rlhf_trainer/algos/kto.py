"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306): good and bad responses
without pairs, valued against a reference point as people value gains and losses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def reference_point(log_ratio_sum: float, rows: int) -> float:
    """z0 = max(0, mean log pi(y')/pi_ref(y')) over mismatched prompts and responses: the paper's estimate of
    KL(pi‖pi_ref). ``log_ratio_sum`` is over all ``rows`` of the batch, of all ranks; no gradient flows through it."""
    return max(0.0, log_ratio_sum / rows)


def kto_losses(
    log_ratio: Tensor,
    desirable: Tensor,
    *,
    reference: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_y - v(x, y) per response (B,), with v = lambda_D sigma(beta (r - z0)) for the good and
    lambda_U sigma(beta (z0 - r)) for the bad.

    ``log_ratio`` is r = log pi(y|x) - log pi_ref(y|x) summed over the response; ``desirable`` is bool (B,);
    ``reference`` is z0. The loss saturates both ways: a response already far from z0 is left alone.
    """
    gain = torch.where(desirable, log_ratio - reference, reference - log_ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1.0 - torch.sigmoid(beta * gain))


def mismatched(prompts: Sequence[Hashable]) -> list[int]:
    """For each row the row whose response it borrows: the next one, cyclically, that has another prompt.

    Where all prompts are the same it is simply the next.
    """
    count = len(prompts)
    borrowed = []
    for row, prompt in enumerate(prompts):
        following = ((row + step) % count for step in range(1, count + 1))
        borrowed.append(next((other for other in following if prompts[other] != prompt), (row + 1) % count))
    return borrowed
