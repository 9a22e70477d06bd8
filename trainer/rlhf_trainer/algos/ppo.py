"""The clipped surrogate and value losses of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """``loss`` carries the gradient; the rest are sums over tokens, for global means."""

    loss: Tensor
    clipped_tokens: Tensor
    approx_kl_sum: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, tokens: float
) -> PolicyLoss:
    """-min(ratio A, clip(ratio, 1±clip) A), summed over the mask and divided by ``tokens``, the global token count.

    ``approx_kl_sum`` uses k3 of old against new (Huang et al. 2022, detail 12 of PPO's implementation).
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(plain, clipped) * mask).sum() / tokens
    with torch.no_grad():
        outside = ((clipped > plain) * mask).sum()
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum()
    return PolicyLoss(loss, outside, approx_kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, tokens: float
) -> Tensor:
    """½ max of the plain and the clipped squared error (Huang et al. 2022, detail 9), over the global token count."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / tokens
