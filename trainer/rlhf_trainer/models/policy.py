"""A policy and its value head on one trunk, and the token log-probabilities both training and reference need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.algos.rewards import response_mask
from rlhf_trainer.data.encoding import Encoder, pad_right
from rlhf_trainer.exits import Invalid


@dataclass(frozen=True)
class Batch:
    """Prompts and their responses, right-padded. B rows, L tokens, T = longest response."""

    ids: Tensor  # (B, L) prompt then response
    attention: Tensor  # (B, L)
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor  # (B,) response tokens, end of sequence included

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
    ) -> Batch:
        ids, attention = pad_right([[*p, *r] for p, r in zip(prompts, responses, strict=True)], pad_id)
        return cls(
            ids.to(device),
            attention.to(device),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.tensor([len(response) for response in responses], device=device),
        )

    @property
    def width(self) -> int:
        return int(self.lengths.max())

    def positions(self) -> Tensor:
        """(B, T) index of each response token; past a row's end the index stays on its last token."""
        steps = torch.arange(self.width, device=self.ids.device)[None, :]
        return self.prompt_lengths[:, None] + torch.minimum(steps, self.lengths[:, None] - 1)

    def mask(self) -> Tensor:
        return response_mask(self.lengths, self.width)


@dataclass(frozen=True)
class Scored:
    """Per response token (B, T), 0 after the end: log p, the policy's entropy, and the hidden state (B, T, H) of the
    position that predicts it."""

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def score_tokens(lm: Any, batch: Batch, temperature: float) -> Scored:
    """Log-probabilities of the response tokens under ``lm`` at ``temperature``, in float32.

    Logits are computed only where a response token is predicted, not for prompts and padding.
    """
    hidden = lm.base_model(input_ids=batch.ids, attention_mask=batch.attention).last_hidden_state
    positions = batch.positions()
    before = (positions - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    states = hidden.gather(1, before)
    logits = lm.get_output_embeddings()(states).float() / temperature
    distribution = torch.log_softmax(logits, dim=-1)
    chosen = distribution.gather(-1, batch.ids.gather(1, positions)[..., None])[..., 0]
    mask = batch.mask()
    entropy = -(distribution.detach().exp() * distribution.detach()).sum(dim=-1)
    return Scored(chosen * mask, entropy * mask, states)


class ActorCritic(nn.Module):
    """A causal language model with a scalar value head on its last hidden state; one module, so one engine."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.config.hidden_size, 1)
        # Zero, so that the first advantages are the rewards themselves and not noise.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, values and entropies (B, T) of the response tokens."""
        scored = score_tokens(self.lm, batch, temperature)
        values: Tensor = self.value_head(scored.hidden).float()[..., 0]
        return scored.logprobs, values * batch.mask(), scored.entropy


def load_policy(path: Path | str) -> tuple[Any, Encoder]:
    """A causal LM in float32 without dropout (the ratio of an unchanged policy must be 1), and its encoder.

    Raises Invalid when the folder holds no such model.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise Invalid(f"{path}: not a Hugging Face causal language model with a tokenizer ({error})") from error
    return lm.eval(), Encoder(tokenizer)


def reference_logprobs(lm: Any, batch: Batch, temperature: float) -> Tensor:
    """(B, T) log-probabilities of the response tokens under the frozen reference."""
    with torch.no_grad():
        return score_tokens(lm, batch, temperature).logprobs
