"""The default sampler: a plain decoding loop over a Hugging Face model with a right-sized static KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from rlhf_trainer.generate.base import Completion, Request, SampleKey, SamplingParams
from rlhf_trainer.randomness import generator

_COMPACT_SHARE = 0.75  # a batch with no more rows than this running lets the finished ones go


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
    """One batch being decoded, a token per row and step. Rows that are done can be let go by ``keep``."""

    def __init__(self, model: Any, requests: Sequence[Request], params: SamplingParams, pad_id: int) -> None:
        self._model, self._params = model, params
        device = next(model.parameters()).device
        # Samples of one prompt read it once; each gets the prompt's keys and values with its first token.
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
        self._prompt_of = torch.tensor([prompts[r.prompt] for r in requests], device=device)
        width = max(len(prompt) for prompt in prompts)
        self._input = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        columns = torch.arange(width + params.max_new_tokens, device=device)
        # Left padding is masked by length, never by token id: pad may equal another token.
        padded = any(len(prompt) < width for prompt in prompts)
        self._mask = (columns[None, :] >= (width - lengths)[:, None]).long() if padded else None
        self._positions = (columns[None, :width] - (width - lengths)[:, None]).clamp_min(0)
        self._cache = new_cache(model.config, width + params.max_new_tokens)
        noise = np.stack([_uniforms(r.key, params.max_new_tokens) for r in requests])
        self._uniforms = torch.from_numpy(noise).to(device)
        self._filled, self._step = width, 0

    @torch.inference_mode()  # a fifth cheaper than no_grad where a step is small
    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of every row (B,) and its log-probability (B,), finished rows included."""
        output = self._model(
            input_ids=self._input,
            attention_mask=self._attention(),
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
        if self._step == 0 and len(self._prompt_of) > len(logits):
            logits = logits[self._prompt_of]
            self._take(self._prompt_of)
        tokens, logprobs = draw(logits, self._uniforms[:, self._step], self._params.temperature)
        self._input = tokens[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._filled += 1
        self._step += 1
        return tokens, logprobs

    def keep(self, rows: Tensor) -> None:
        """Lets all rows but these (indices) go, with their part of the cache."""
        rows = rows.to(self._input.device)
        self._input, self._uniforms = self._input[rows], self._uniforms[rows]
        self._take(rows)

    def _take(self, rows: Tensor) -> None:
        """Goes on with these rows (indices) of what has been read."""
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        self._cache.reorder_cache(rows)

    def _attention(self) -> Tensor | None:
        """None without padding, where attention needs no mask. A decoding step's mask is handed over in the shape that
        the kernel takes, since transformers would make it anew, and at length, for every token."""
        if self._mask is None:
            return None
        mask = self._mask[:, : self._filled]
        plain = isinstance(self._cache.layers[0], FilledLayer) and self._model.config._attn_implementation == "sdpa"
        return mask.bool()[:, None, None, :] if self._step > 0 and plain else mask


class FilledLayer(StaticLayer):  # type: ignore[misc]  # transformers carries no types
    """Keys and values in buffers of their final size, of which attention is given the columns filled so far."""

    is_compileable = False

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self._filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        self.keys[:, :, start : self._filled] = key_states
        self.values[:, :, start : self._filled] = value_states
        return self.keys[:, :, : self._filled], self.values[:, :, : self._filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        return self._filled


def new_cache(config: Any, length: int) -> Cache:
    """A cache of ``length`` columns; models with other than plain attention layers get transformers' own."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or getattr(config, "sliding_window", None):
        return StaticCache(config=config, max_cache_len=length)
    return Cache(layers=[FilledLayer(length) for _ in range(config.num_hidden_layers)])


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
        shape = (len(requests), params.max_new_tokens)
        tokens, logprobs = torch.full(shape, self._eos_id), torch.zeros(shape)
        rows = torch.arange(len(requests))  # which requests are being decoded
        running = torch.ones(len(requests), dtype=torch.bool)
        for step in range(params.max_new_tokens):
            drawn, theirs = (column.cpu() for column in decoding.step())
            tokens[rows[running], step], logprobs[rows[running], step] = drawn[running], theirs.float()[running]
            running &= drawn != self._eos_id
            left = int(running.sum())
            if left == 0:
                break
            # Letting rows go copies the cache once, about what one more step with them would cost.
            if left <= _COMPACT_SHARE * len(running) and step + 1 < params.max_new_tokens:
                kept = running.nonzero()[:, 0]
                decoding.keep(kept)
                rows, running = rows[kept], running[kept]
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
