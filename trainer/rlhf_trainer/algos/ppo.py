"""The clipped surrogate and value losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

``weights`` (B, T) are each token's share of the mean, from ``normalization``; 0 outside the response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """ratio in [1 - low, 1 + high]; ``dual`` bounds it where the advantage is negative (Ye et al. 2020)."""

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """``loss`` carries the gradient; ``clipped_tokens`` is a count, for a global mean."""

    loss: Tensor
    clipped_tokens: Tensor


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip: Clip) -> PolicyLoss:
    """-min(ratio A, clip(ratio) A), and for A < 0 not below dual * A, summed with the given weights.

    Without the dual bound a token with A < 0 that the policy has made likely gives an unbounded loss.
    """
    inside = weights > 0
    ratio = ((logprobs - old_logprobs) * inside).exp()
    plain = -advantages * ratio
    bounded = torch.maximum(plain, -advantages * ratio.clamp(1 - clip.low, 1 + clip.high))
    if clip.dual is not None:
        bounded = torch.where(advantages < 0, torch.minimum(bounded, -clip.dual * advantages), bounded)
    return PolicyLoss((bounded * weights).sum(), ((bounded != plain) & inside).sum())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float) -> Tensor:
    """½ max of the plain and the clipped squared error (Huang et al. 2022, detail 9), summed with the weights."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * weights).sum()
