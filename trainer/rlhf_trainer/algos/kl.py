"""Divergence from the reference policy: sampled estimators and the controllers of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

_ERROR_BOUND = 0.2  # Ziegler et al. 2019 clip the proportional error here


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log p - log q of sampled tokens: unbiased, may be negative (http://joschu.net/blog/kl-approx.html).

    In the *reward* its expectation gives the right gradient of KL(p‖q). As a *loss* term it does not: its own
    gradient has expectation zero, so it must not be minimised directly.
    """
    return logprobs - reference


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(r - 1) - log r with r = q/p: unbiased, never negative, low variance. For reporting; as a loss term its
    gradient is that of KL(q‖p) in expectation, not of KL(p‖q)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


def k2_loss(logprobs: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """(B, T) p/p_old ½ (log p - log q)² of tokens sampled from p_old, the weight held constant: its gradient is
    p/p_old (log p - log q) grad log p, in expectation that of KL(p‖q) however far p has moved from p_old."""
    ratio = (logprobs - old).exp().detach()
    return ratio * 0.5 * (logprobs - reference) ** 2


def k3_loss(logprobs: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """(B, T) p/p_old k3, differentiated through the weight too: that term turns k3's gradient into KL(p‖q)'s, the
    same as k2_loss's, while its value estimates KL(p‖q) without bias."""
    return (logprobs - old).exp() * k3(logprobs, reference)


class KLController(Protocol):
    """The weight of the KL penalty over a run; its whole state is ``coefficient``."""

    @property
    def coefficient(self) -> float: ...

    def update(self, kl: float, samples: int) -> None:
        """``kl``: mean sequence KL in nats over ``samples`` rollouts of the step just taken."""
        ...


@dataclass
class FixedKL:
    coefficient: float

    def update(self, kl: float, samples: int) -> None:
        """The weight stays what the user set."""


@dataclass
class AdaptiveKL:
    """Proportional control in log space towards ``target`` nats (Ziegler et al. 2019, section 2.2):
    e = clip(KL/target - 1, ±0.2), weight *= 1 + e * samples / horizon.

    A batch beyond the horizon corrects as one of the horizon: five of them would bring the weight to 0, more below it.
    """

    coefficient: float
    target: float
    horizon: int

    def update(self, kl: float, samples: int) -> None:
        error = max(-_ERROR_BOUND, min(_ERROR_BOUND, kl / self.target - 1.0))
        self.coefficient *= 1.0 + error * min(1.0, samples / self.horizon)
