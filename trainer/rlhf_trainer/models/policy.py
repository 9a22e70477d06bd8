"""A policy and its value head on one trunk, and the token log-probabilities both training and reference need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.algos.rewards import response_mask
from rlhf_trainer.data.encoding import Encoder, pad_right
from rlhf_trainer.exits import Invalid
from rlhf_trainer.models.logprobs import head_logprobs
from rlhf_trainer.models.packing import row_states

# What configurations call a cap or a factor that is put on logits: Gemma 2, Cohere, Granite, Falcon H1, Griffin.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")


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

    @cached_property
    def width(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Row and place in the response (N,) of each response token, row by row."""
        rows, steps = self.mask().nonzero(as_tuple=True)
        return rows, steps

    def mask(self) -> Tensor:
        return response_mask(self.lengths, self.width)

    def targets(self) -> Tensor:
        """(N,) ids of the response tokens."""
        rows, steps = self.tokens
        return self.ids[rows, self.prompt_lengths[rows] + steps]

    def spread(self, values: Tensor) -> Tensor:
        """(N, ...) numbers of the response tokens → (B, T, ...), 0 after a row's end."""
        return values.new_zeros(len(self.ids), self.width, *values.shape[1:]).index_put(self.tokens, values)


@dataclass(frozen=True)
class Scored:
    """Per response token (B, T), 0 after the end: log p and the policy's entropy; and the hidden states (N, H) that
    predict the N response tokens, row by row."""

    logprobs: Tensor
    entropy: Tensor
    states: Tensor


def score_tokens(lm: Any, batch: Batch, temperature: float) -> Scored:
    """Log-probabilities of the response tokens under ``lm`` at ``temperature``, in float32.

    Nothing is computed for padding, and logits only where a response token is predicted.
    """
    states = predicting_states(lm.base_model, batch)
    logprobs, entropy = head_logprobs(lm, states, batch.targets(), temperature)
    return Scored(batch.spread(logprobs), batch.spread(entropy), states)


def predicting_states(trunk: Any, batch: Batch) -> Tensor:
    """(N, H) hidden states that predict the N response tokens of the batch, row by row; ``Batch.spread`` brings what
    is computed from them into (B, T)."""
    states, places = row_states(trunk, batch.ids, batch.prompt_lengths + batch.lengths)
    rows, steps = batch.tokens
    return states.index_select(0, places[rows, batch.prompt_lengths[rows] + steps - 1])


def new_value_head(lm: Any) -> nn.Linear:
    """On the states that the output head reads, which OPT-350m projects to half the width of its layers."""
    head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1)
    # Zero, so that the first advantages are the rewards themselves and not noise.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class ActorCritic(nn.Module):
    """A causal language model with a scalar value head on its last hidden state; one module, so one engine."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = new_value_head(lm)

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, values and entropies (B, T) of the response tokens."""
        scored = score_tokens(self.lm, batch, temperature)
        values: Tensor = self.value_head(scored.states).float()[:, 0]
        return scored.logprobs, batch.spread(values), scored.entropy


def load_policy(path: Path | str) -> tuple[Any, Encoder]:
    """A causal LM in float32 without dropout (the ratio of an unchanged policy must be 1), and its encoder.

    Raises Invalid when the folder holds no such model.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise Invalid(f"{path}: not a Hugging Face causal language model with a tokenizer ({error})") from error
    settings = {name: getattr(lm.config, name, None) for name in _AFTER_HEAD}
    changed = [f"{name} {value}" for name, value in settings.items() if value not in (None, 0, 1)]
    if changed:
        raise Invalid(
            f"{path}: {lm.config.model_type} changes its logits after the head ({', '.join(changed)}), which is not "
            "supported; use a model whose logits are those of its head"
        )
    return lm.eval(), Encoder(tokenizer)


def reference_logprobs(lm: Any, batch: Batch, temperature: float) -> Tensor:
    """(B, T) log-probabilities of the response tokens under the frozen reference."""
    with torch.no_grad():
        return score_tokens(lm, batch, temperature).logprobs
