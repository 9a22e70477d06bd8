"""Policies straight from preferences: DPO (Rafailov et al. 2023), cDPO (Mitchell 2023), IPO (Azar et al. 2023).

All work on one number per pair, the margin

    h = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected)),

with log-probabilities summed over the response tokens, end of sequence included. ``beta * h`` is the difference of
implicit rewards, so under DPO a pair is a Bradley-Terry comparison. ``probability`` is that of the first response
being the better: 1 for a plain label, ½ for a tie, anything between for a soft one.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def margins(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    """h (B,) in nats from the sequence log-probabilities (B,) of policy and reference."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def dpo_losses(margin: Tensor, probability: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-[q log sigma(beta h) + (1 - q) log sigma(-beta h)] per pair (B,), in nats.

    q is ``probability`` after a share ``label_smoothing`` of labels is taken to be flipped. A plain label makes
    this DPO; with smoothing e it is cDPO, whose minimum lies at beta h = log((1 - e) / e) and not at infinity.
    """
    q = probability * (1.0 - label_smoothing) + (1.0 - probability) * label_smoothing
    return functional.binary_cross_entropy_with_logits(beta * margin, q.to(margin), reduction="none")


def ipo_losses(margin: Tensor, probability: Tensor, *, tau: float) -> Tensor:
    """p (h - 1/(2 tau))² + (1 - p) (h + 1/(2 tau))² per pair (B,); equation 17 of the paper.

    Log-probabilities are summed as in the paper, not averaged over tokens as some libraries do. The minimum for a
    plain label lies at h = 1/(2 tau), however separable the data; a tie pulls h to 0.
    """
    target = 0.5 / tau
    return probability * (margin - target) ** 2 + (1.0 - probability) * (margin + target) ** 2
