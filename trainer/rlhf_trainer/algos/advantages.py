"""Advantages without a critic, and whitening by moments that are global over ranks and micro-batches.

Group functions take scores (B,) in which the ``group`` samples of a prompt stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-4  # beside a standard deviation: a group of equal scores gets advantages of 0, not of noise


@dataclass(frozen=True)
class Moments:
    """Sums over masked-in tokens; those of two parts of a batch add up to those of the whole."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Moments:
        kept = values.double() * mask
        return cls(float(mask.sum()), float(kept.sum()), float((kept * kept).sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1.0)

    @property
    def variance(self) -> float:
        return max(0.0, self.squares / max(self.count, 1.0) - self.mean**2)


def whiten(values: Tensor, mask: Tensor, moments: Moments) -> Tensor:
    """(values - mean) / sd with the given global moments, 0 outside the mask."""
    scale = float((moments.variance + 1e-8) ** -0.5)
    return (values - moments.mean) * scale * mask


def rescale(scores: Tensor) -> Tensor:
    """Scores (B,) with deviation 1 and their own mean: the balance with penalties stops depending on the reward
    model's units, while the mean still says whether replies are good (Huang et al. 2022, whitening without shift)."""
    moments = Moments.of(scores, torch.ones_like(scores))
    return whiten(scores, torch.ones_like(scores), moments) + moments.mean


def centred(scores: Tensor, group: int) -> Tensor:
    """Score minus the mean of its group (Dr. GRPO, Liu et al. 2025, https://arxiv.org/abs/2503.20783)."""
    grouped = scores.reshape(-1, group)
    return (grouped - grouped.mean(dim=1, keepdim=True)).reshape(-1)


def group_relative(scores: Tensor, group: int) -> Tensor:
    """Centred and divided by the group's deviation (GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300)."""
    deviation = scores.reshape(-1, group).std(dim=1, keepdim=True)
    return (centred(scores, group).reshape(-1, group) / (deviation + _EPS)).reshape(-1)


def batch_relative(scores: Tensor, group: int) -> Tensor:
    """Centred by the group, divided by the deviation of all scores: an easy prompt's small differences stay small."""
    return centred(scores, group) / (scores.std() + _EPS)


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """Score minus the mean of the *other* samples of its group: an unbiased baseline (RLOO, Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740)."""
    grouped = scores.reshape(-1, group)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).reshape(-1)


def equal_groups(scores: Tensor, group: int) -> float:
    """Share of groups whose scores are all equal: they teach nothing. A group of one cannot differ, so then the batch
    as a whole is judged."""
    grouped = scores.reshape(-1, group if group > 1 else len(scores))
    return float(((grouped.amax(dim=1) - grouped.amin(dim=1)) < 1e-6).float().mean())
