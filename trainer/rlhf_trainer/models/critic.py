"""The trained module of an online algorithm: the policy, and where there is a critic, the critic too.

One module means one engine, one optimiser and one checkpoint. Each has the policy as ``lm`` and answers a batch with
log-probs, values and entropies (B, T) of the response tokens; without a critic values are 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_trainer.models.policy import ActorCritic, Batch, new_value_head, predicting_states, score_tokens

Outputs = tuple[Tensor, Tensor, Tensor]


class Actor(nn.Module):
    """A policy alone."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, temperature: float) -> Outputs:
        scored = score_tokens(self.lm, batch, temperature)
        return scored.logprobs, torch.zeros_like(scored.logprobs), scored.entropy


class SharedCritic(ActorCritic):
    """A value head on the policy's trunk. While ``warming`` the head learns and the trunk does not: moving it would
    move the policy."""

    warming = False

    def forward(self, batch: Batch, temperature: float) -> Outputs:
        scored = score_tokens(self.lm, batch, temperature)
        states = scored.states.detach() if self.warming else scored.states
        return scored.logprobs, _values(self.value_head, states, batch), scored.entropy


class SeparateCritic(nn.Module):
    """A policy and a critic with a trunk of its own, started from the policy's: values cannot disturb the policy."""

    warming = False

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.critic = copy.deepcopy(lm.base_model)
        self.value_head = new_value_head(lm)

    def forward(self, batch: Batch, temperature: float) -> Outputs:
        scored = score_tokens(self.lm, batch, temperature)
        states = predicting_states(self.critic, batch)
        return scored.logprobs, _values(self.value_head, states, batch), scored.entropy


def _values(head: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    values: Tensor = head(states).float()[:, 0]
    return batch.spread(values)
