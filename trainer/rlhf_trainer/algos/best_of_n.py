"""Sampling-based best of n (RAFT, Dong et al. 2023, https://arxiv.org/abs/2304.06767): imitate the best sample."""

from __future__ import annotations

import torch
from torch import Tensor


def best_rows(scores: Tensor, group: int) -> Tensor:
    """(B / group,) index of each group's best row; of equals the first, so that the choice is repeatable."""
    grouped = scores.reshape(-1, group)
    # max() may return any of several maxima; the first True is unambiguous.
    best = (grouped == grouped.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    return best + group * torch.arange(len(grouped))


def cross_entropy(logprobs: Tensor, weights: Tensor) -> Tensor:
    """-sum of weights * log p, with the weights (B, T) of ``normalization``."""
    return -(logprobs * weights).sum()
