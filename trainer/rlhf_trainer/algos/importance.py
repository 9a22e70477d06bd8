"""Correction for a sampler that is not the trainer: other kernels, another precision (Yao et al. 2025, truncated
importance sampling, https://fengyao.notion.site/off-policy-rl)."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def ratios(trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
    """(B, T) p(trainer) / p(sampler) of the sampled tokens; 1 outside the mask."""
    return ((trainer - sampler) * mask).exp()


def truncated_weights(trainer: Tensor, sampler: Tensor, mask: Tensor, cap: float = 2.0) -> Tensor:
    """``ratios`` cut at ``cap``: the cap bounds the variance and costs a bias only where the two disagree by more."""
    return ratios(trainer, sampler, mask).clamp_max(cap)


def spread(ratio: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and 95th percentile of the masked-in ratios."""
    kept = ratio[mask.bool()].double().numpy(force=True)
    return float(kept.mean()), float(np.quantile(kept, 0.95))  # torch's own takes 16 million numbers at most
