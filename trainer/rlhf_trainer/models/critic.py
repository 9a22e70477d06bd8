"""The trained module of an online algorithm: the policy, and where there is a critic, the critic too.

One module means one engine, one optimiser and one checkpoint. Each has the policy as ``lm`` and answers a batch with
log-probs, values and entropies (B, T) of the response tokens; without a critic values are 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_trainer.models.policy import ActorCritic, Batch, score_tokens

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
        hidden = scored.hidden.detach() if self.warming else scored.hidden
        return scored.logprobs, _values(self.value_head, hidden, batch), scored.entropy


class SeparateCritic(nn.Module):
    """A policy and a critic with a trunk of its own, started from the policy's: values cannot disturb the policy."""

    warming = False

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.critic = copy.deepcopy(lm.base_model)
        self.value_head = nn.Linear(lm.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch, temperature: float) -> Outputs:
        scored = score_tokens(self.lm, batch, temperature)
        hidden = self.critic(input_ids=batch.ids, attention_mask=batch.attention).last_hidden_state
        before = (batch.positions() - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        return scored.logprobs, _values(self.value_head, hidden.gather(1, before), batch), scored.entropy


def _values(head: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    values: Tensor = head(hidden).float()[..., 0]
    return values * batch.mask()
