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


def without_end(finished: Tensor, penalty: float) -> Tensor:
    """(B,) ``penalty`` for each reply that the length limit cut, else 0."""
    return penalty * (~finished).float()


def overlong(lengths: Tensor, *, start: int, longest: int, penalty: float) -> Tensor:
    """(B,) 0 up to ``start`` tokens, then rising in a straight line to ``penalty`` at ``longest`` (DAPO, Yu et al.
    2025, equation 13)."""
    return penalty * ((lengths - start) / (longest - start)).clamp(0.0, 1.0)


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coefficient: float) -> Tensor:
    """(B, T): -kl_coefficient * kl at every response token, and the score at the last one.

    The last token is the end of sequence where the reply has one, else the token the length limit cut at. Nothing
    lands on padding.
    """
    rewards = -kl_coefficient * kl * response_mask(lengths, kl.shape[1])
    last = torch.nn.functional.one_hot(lengths - 1, kl.shape[1])
    return rewards + last * scores[:, None]


def sequence_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coefficient: float) -> Tensor:
    """(B,): the score minus kl_coefficient times the sequence's log-ratio: a whole reply as one action."""
    return scores - kl_coefficient * (kl * response_mask(lengths, kl.shape[1])).sum(dim=1)
