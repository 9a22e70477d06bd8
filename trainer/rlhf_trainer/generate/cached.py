"""The default sampler: a plain decoding loop over a Hugging Face model with a right-sized static KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import StaticCache

from rlhf_trainer.generate.base import Completion, Request, SampleKey, SamplingParams
from rlhf_trainer.randomness import generator


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling. logits (B, V), uniform (B,) in [0, 1) → tokens (B,), log-probs (B,).

    The inverse CDF turns one uniform into one token, so that a sample needs no generator state. Greedy
    (temperature 0) reports the log-probability at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        # Rounding may leave the last entry below 1; scaling keeps every draw inside the support.
        target = uniform.to(cumulative) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Decoding:
    """One batch being decoded, a token per row and step; the server streams from it, the trainer drains it."""

    def __init__(self, model: Any, requests: Sequence[Request], params: SamplingParams, pad_id: int) -> None:
        self._model, self._params = model, params
        device = next(model.parameters()).device
        width = max(len(request.prompt) for request in requests)
        rows = [[pad_id] * (width - len(r.prompt)) + list(r.prompt) for r in requests]
        self._input = torch.tensor(rows, device=device)
        lengths = torch.tensor([len(r.prompt) for r in requests], device=device)
        columns = torch.arange(width + params.max_new_tokens, device=device)
        # Left padding is masked by length, never by token id: pad may equal another token.
        self._mask = (columns[None, :] >= (width - lengths)[:, None]).long()
        self._positions = (columns[None, :width] - (width - lengths)[:, None]).clamp_min(0)
        self._cache = StaticCache(config=model.config, max_cache_len=width + params.max_new_tokens)
        noise = np.stack([_uniforms(r.key, params.max_new_tokens) for r in requests])
        self._uniforms = torch.from_numpy(noise).to(device)
        self._filled, self._step = width, 0

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of every row (B,) and its log-probability (B,), finished rows included."""
        output = self._model(
            input_ids=self._input,
            attention_mask=self._mask[:, : self._filled],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens, logprobs = draw(output.logits[:, -1], self._uniforms[:, self._step], self._params.temperature)
        self._input = tokens[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._filled += 1
        self._step += 1
        return tokens, logprobs


class CachedGenerator:
    """Batches requests of similar length and decodes each batch until its last row has stopped."""

    def __init__(self, model: Any, *, pad_id: int, eos_id: int, max_batch: int = 256) -> None:
        self._model, self._pad_id, self._eos_id, self._max_batch = model, pad_id, eos_id, max_batch

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        training = self._model.training
        self._model.eval()
        try:
            completions: dict[int, Completion] = {}
            for batch in _by_length(requests, self._max_batch):
                done = self._decode([requests[index] for index in batch], params)
                completions.update(zip(batch, done, strict=True))
            return [completions[index] for index in range(len(requests))]
        finally:
            self._model.train(training)

    def _decode(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        decoding = Decoding(self._model, requests, params, self._pad_id)
        running = torch.ones(len(requests), dtype=torch.bool)
        columns: list[tuple[Tensor, Tensor]] = []
        for _ in range(params.max_new_tokens):
            tokens, logprobs = (column.cpu() for column in decoding.step())
            columns.append((tokens, logprobs))
            running &= tokens != self._eos_id
            if not running.any():
                break
        tokens = torch.stack([t for t, _ in columns], dim=1)
        logprobs = torch.stack([p for _, p in columns], dim=1)
        return [self._cut(row, values) for row, values in zip(tokens.tolist(), logprobs.tolist(), strict=True)]

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        if self._eos_id in tokens:
            end = tokens.index(self._eos_id) + 1
            return Completion(tuple(tokens[:end]), tuple(logprobs[:end]), "stop")
        return Completion(tuple(tokens), tuple(logprobs), "length")


def _uniforms(key: SampleKey, count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1) of one sample; a longer draw begins with the shorter one."""
    return generator(key.seed, key.stream, key.step, key.sample).random(count)


def _by_length(requests: Sequence[Request], max_batch: int) -> Iterator[list[int]]:
    """Indices in batches of neighbours by prompt length: little padding, and a cache no longer than needed."""
    order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt), index))
    for start in range(0, len(order), max_batch):
        yield order[start : start + max_batch]
