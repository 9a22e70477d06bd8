"""Continuous batching: sequences join and leave between two tokens, and all that are there share each forward pass.

Rows are padded on the left to a common length; position ids and the attention mask make the padding invisible, so what
a row says does not depend on its neighbours (up to the last bits of floating point). A row's randomness is its own too.
The cache is kept as plain tensors, and works for every decoder whose layers cache keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from rlhf_trainer.generate.cached import draw
from rlhf_trainer.randomness import Stream, generator

_COLDEST = 1e-5  # colder is greedy, as with vLLM: logits over such a temperature may not fit float32


class UnsupportedModelError(ValueError):
    """A model whose state is not a plain key-value cache; the message says what to do."""


@dataclass(eq=False)
class Row:
    """One sequence being written. prompt: token ids, not empty. temperature 0 is greedy."""

    prompt: tuple[int, ...]
    temperature: float
    seed: int
    draws: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.draws = generator(self.seed, Stream.GENERATION)


class Batch:
    """The sequences in progress. Not thread-safe: one worker owns it."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._device: torch.device = next(model.parameters()).device
        self._rows: list[Row] = []
        self._cache: list[tuple[Tensor, Tensor]] = []  # per layer: keys, values (B, heads, T, width)
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._device)  # (B, T)
        self._next = torch.zeros((0, 1), dtype=torch.long, device=self._device)  # newest token of each row, (B, 1)

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[int]:
        """Take sequences in; the first token of each."""
        width = max(len(row.prompt) for row in rows)
        padded = [[self._pad_id] * (width - len(row.prompt)) + list(row.prompt) for row in rows]
        ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(row.prompt) for row in rows], device=self._device)
        mask = (torch.arange(width, device=self._device)[None, :] >= (width - lengths)[:, None]).long()
        logits, cache = self._forward(ids, mask, DynamicCache())
        tokens = self._draw(rows, logits)
        length = max(width, self._mask.shape[1])
        joined = [_left_pad(pair, length) for pair in cache]
        if self._rows:
            mine = [_left_pad(pair, length) for pair in self._cache]
            joined = [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), (c, d) in zip(mine, joined, strict=True)]
        self._cache = joined
        self._mask = torch.cat((_widen(self._mask, length), _widen(mask, length)))
        self._next = torch.cat((self._next, tokens[:, None]))
        self._rows = [*self._rows, *rows]
        found: list[int] = tokens.tolist()
        return found

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of every row, in the order they joined."""
        mask = functional.pad(self._mask, (0, 1), value=1)
        logits, self._cache = self._forward(self._next, mask, DynamicCache(self._cache))
        self._mask = mask
        tokens = self._draw(self._rows, logits)
        self._next = tokens[:, None]
        found: list[int] = tokens.tolist()
        return found

    @torch.inference_mode()
    def keep(self, indices: Sequence[int]) -> None:
        """Let all other rows go, and the columns that nobody needs any more."""
        self._rows = [self._rows[index] for index in indices]
        if not self._rows:
            self._cache, self._mask, self._next = [], self._mask[:0, :0], self._next[:0]
            return
        chosen = torch.tensor(indices, device=self._device)
        mask = self._mask[chosen]
        unused = int(mask.any(dim=0).int().argmax())  # columns before the longest row begins
        self._mask, self._next = mask[:, unused:], self._next[chosen]
        self._cache = [(keys[chosen, :, unused:], values[chosen, :, unused:]) for keys, values in self._cache]

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """ids (B, S), mask (B, T+S) → logits of the last position (B, V), and the grown cache."""
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        grown = [_pair(layer) for layer in output.past_key_values.layers]
        return output.logits[:, -1], grown

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        uniforms = torch.tensor([row.draws.random() for row in rows], dtype=torch.float64, device=self._device)
        temperatures = torch.tensor([row.temperature for row in rows], device=self._device)[:, None]
        greedy = temperatures < _COLDEST
        sampled, _ = draw(logits.float() / temperatures.masked_fill(greedy, 1.0), uniforms, 1.0)
        return torch.where(greedy[:, 0], logits.argmax(dim=-1), sampled)


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        raise UnsupportedModelError(
            f"a layer of this model keeps {type(layer).__name__} and not keys and values: use another serving engine"
        )
    return keys, values


def _left_pad(pair: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    missing = length - pair[0].shape[2]
    return (functional.pad(pair[0], (0, 0, missing, 0)), functional.pad(pair[1], (0, 0, missing, 0)))


def _widen(mask: Tensor, length: int) -> Tensor:
    return functional.pad(mask, (length - mask.shape[1], 0))
