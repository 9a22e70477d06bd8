"""Learning given responses by maximum likelihood: supervised fine-tuning and sequence distillation (Kim and Rush
2016, https://arxiv.org/abs/1606.07947), which differ only in who wrote them."""

from __future__ import annotations

from torch import Tensor


def token_cross_entropy(logprobs: Tensor, mask: Tensor, tokens: float) -> Tensor:
    """-log p summed over the mask (B, T) and divided by ``tokens``, the global count of response tokens, in nats."""
    return -(logprobs * mask).sum() / tokens
