"""What each token weighs in the loss: a share of a mean that is global over ranks and micro-batches.

Given the lengths (B,) of *all* rows of an optimiser step, the weights (B, T) of any part of them are rows of one
tensor, so that losses of parts add up exactly to the loss of the whole.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_trainer.algos.rewards import response_mask


def per_token(lengths: Tensor, width: int) -> Tensor:
    """1 / all tokens: a long reply weighs more than a short one."""
    return response_mask(lengths, width) / lengths.sum()


def per_sequence(lengths: Tensor, width: int) -> Tensor:
    """1 / (rows x own length): every reply weighs the same, a token of a long one less (GRPO)."""
    return response_mask(lengths, width) / (lengths[:, None] * len(lengths))


def per_max_length(lengths: Tensor, width: int, longest: int) -> Tensor:
    """1 / (rows x longest): the gradient of the summed log-probability, free of length bias (Dr. GRPO)."""
    return response_mask(lengths, width) / (longest * len(lengths))
