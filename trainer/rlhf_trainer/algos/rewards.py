"""From one score per reply to one reward per token (Ziegler et al. 2019; Stiennon et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) float: 1 on the first ``lengths`` tokens of each row. From lengths, so pad may be any token."""
    return (torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]).float()


def conservative(mean: Tensor, std: Tensor, std_penalty: float) -> Tensor:
    """mean - lambda * std over the reward ensemble, per reply (Coste et al. 2023)."""
    return mean - std_penalty * std


def token_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, finished: Tensor, *, kl_coefficient: float, missing_eos_penalty: float
) -> Tensor:
    """(B, T): -kl_coefficient * kl at every response token, and the score at the last one.

    The last token is the end of sequence where the reply ``finished``, else the token the length limit cut at, where
    ``missing_eos_penalty`` is taken off. Nothing lands on padding.
    """
    mask = response_mask(lengths, kl.shape[1])
    rewards = -kl_coefficient * kl * mask
    final = scores - missing_eos_penalty * (~finished).to(scores)
    last = torch.nn.functional.one_hot(lengths - 1, kl.shape[1]).to(rewards)
    return rewards + last * final[:, None]
