"""Divergence of a student from its teacher, token by token over the whole vocabulary (GKD: Agarwal et al. 2023,
https://arxiv.org/abs/2306.13649).

Both arguments are log-probabilities (..., V) of the same tokens; results are (...,) in nats. The gradient flows
through whichever of them has one; exact sums over V need no sampling estimate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher‖student): the student covers all that the teacher does."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(student‖teacher): the student keeps to what the teacher does."""
    return forward_kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(teacher‖m) + (1 - beta) KL(student‖m) with m = beta teacher + (1 - beta) student.

    Divided by beta it tends to the forward KL as beta → 0; divided by 1 - beta to the reverse as beta → 1.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(teacher, mixture) + (1.0 - beta) * forward_kl(student, mixture)


def students_row(index: int, fraction: float) -> bool:
    """Whether row ``index`` of a batch is answered by the student: ``fraction`` of the rows, evenly spread, so that
    every rank's contiguous share has its part."""
    return math.floor((index + 1) * fraction + 1e-9) > math.floor(index * fraction + 1e-9)
