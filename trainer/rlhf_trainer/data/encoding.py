"""Text into token ids, one recipe for training, scoring, gates and serving: prompt as the tokenizer starts it,
response without special tokens, end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rlhf_trainer.exits import Invalid


class Encoder:
    """Wraps a Hugging Face tokenizer. Raises Invalid for one without distinct pad and end-of-sequence tokens."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise Invalid("the tokenizer has no pad or no eos token; set both in tokenizer_config.json")
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise Invalid(
                "the tokenizer's pad token is its eos token, so that the end of a reply cannot be learnt; "
                "give it a pad token of its own"
            )
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int = tokenizer.eos_token_id

    def prompt(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def response(self, text: str) -> list[int]:
        """Ids of a finished response, end of sequence included."""
        return self._ended(self.tokenizer(text, add_special_tokens=False).input_ids)

    def pair(self, prompt: str, response: str) -> list[int]:
        return self.prompt(prompt) + self.response(response)

    def pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """``pair`` of each, in two calls: a tokenizer's own overhead is most of a short text's cost."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        if not prompts:
            return []
        given = self.tokenizer(list(prompts)).input_ids
        said = self.tokenizer(list(responses), add_special_tokens=False).input_ids
        return [[*prompt, *self._ended(response)] for prompt, response in zip(given, said, strict=True)]

    def _ended(self, ids: Sequence[int]) -> list[int]:
        """With one end of sequence, also where the text writes it out, as exports of chats do."""
        end = len(ids)
        while end and ids[end - 1] == self.eos_id:
            end -= 1
        return [*ids[:end], self.eos_id]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """ids (B, T) and attention mask (B, T). Masks come from lengths, never from token ids."""
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(width or int(lengths.max()))[None, :] < lengths[:, None]
    tokens = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    return torch.full(inside.shape, pad_id).masked_scatter_(inside, tokens), inside.long()
