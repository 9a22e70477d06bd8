"""A student as an engine's module: compared with its teacher without whole logits of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_trainer.models.policy import Batch, predicting_states

_LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in float32, each for teacher and student

Divergence = Callable[[Tensor, Tensor], Tensor]  # (teacher, student) log-probs (N, V) → (N,)


class Student(nn.Module):
    """A policy that is compared with a teacher over the whole vocabulary at every response token."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, teacher: Any, divergence: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
        """Divergence and the student's entropy (N,) of the N response tokens, row by row without padding.

        Whole distributions exist for one chunk of tokens at a time and are computed again in the backward pass, so
        that memory does not grow with tokens x vocabulary.
        """
        with torch.no_grad():
            wanted = predicting_states(teacher.base_model, batch)
        states = predicting_states(self.lm.base_model, batch)
        heads = (teacher.get_output_embeddings(), self.lm.get_output_embeddings())
        size = max(1, _LOGITS_PER_CHUNK // self.lm.config.vocab_size)

        def compare(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
            target, student = (
                torch.log_softmax(head(part).float() / temperature, dim=-1)
                for head, part in zip(heads, (theirs, ours), strict=True)
            )
            fixed = student.detach()
            return divergence(target, student), -(fixed.exp() * fixed).sum(dim=-1)

        parts = [
            checkpoint(compare, theirs, ours, use_reentrant=False) if len(states) > size else compare(theirs, ours)
            for theirs, ours in zip(torch.split(wanted, size), torch.split(states, size), strict=True)
        ]
        return torch.cat([found for found, _ in parts]), torch.cat([entropy for _, entropy in parts])
