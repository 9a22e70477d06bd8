"""Whitening of advantages by moments that are global over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
