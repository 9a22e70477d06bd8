"""Returns of token rewards: with a critic (Schulman et al. 2015, https://arxiv.org/abs/1506.02438) and without."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages (equation 16) and returns (B, T) of episodes that end with their last masked-in token.

    ``values[:, t]`` is V of the state before token t. delta_t = r_t + gamma V_{t+1} - V_t, and the value after the last
    token is 0: a reply cut by the length limit is treated as ended, since nothing follows it.
    Returns are advantages + values; both are 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(carry)  # V of the next state
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carry = (delta + gamma * lam * carry) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = carry
    return advantages, (advantages + values) * mask


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """(B, T) sum over later tokens k of gamma^(k - t) r_k: what REINFORCE credits a token with."""
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return returns
