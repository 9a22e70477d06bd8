"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

A batch's logits in float32 are the largest tensor of RLHF by far: 64 x 512 tokens over 152,000 words are 20 GB, and
autograd keeps several copies. Here the vocabulary passes by in chunks: the forward pass keeps a running log-sum-exp
(Milakov & Gimelshein 2018), the backward pass computes each chunk again. Sums are float32 whatever the weights are:
rounding them to bfloat16 biases entropies visibly within a few dozen steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_trainer.exits import Invalid

# Logits held at once, in numbers: 32 MiB of float32. What fits in one chunk is kept for the backward pass, so small
# models compute nothing twice.
CHUNK_NUMBERS = 2**23


def head_logprobs(lm: Any, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Float32 log p (N,) of ``targets`` (N,) and entropy (N,) after the hidden ``states`` (N, H) of ``lm``.

    Gradients reach states and head; the entropy carries none. The head is called as a module, so that what hangs on
    its calls (ZeRO-3 gathers its weight there, also when it is tied to the embedding) happens.
    """
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Invalid(f"{type(lm).__name__} has no linear output head ({type(head).__name__}); use a plain causal LM")

    def forward(states: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(states, head.weight, head.bias, targets, temperature)

    return _call_as(head, forward, states)


def token_logprobs(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_numbers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax((states @ weight.T + bias) / temperature) at ``targets`` (N,), and its entropy (N,) in nats.

    states (N, H), weight (V, H), bias (V,). Results are float32, or float64 for float64 states.
    """
    logprobs, entropy = cast(Any, _TokenLogProbs).apply(  # torch does not annotate it
        states, weight, bias, targets, temperature, chunk_numbers or CHUNK_NUMBERS
    )
    return logprobs, entropy


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, numbers: int
    ) -> tuple[Tensor, Tensor]:
        size = max(1, numbers // max(1, len(states)))
        kept = None
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        peak = torch.full((len(states),), torch.finfo(exact).min, dtype=exact, device=states.device)
        total, moment, chosen = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
        for part in _parts(len(weight), size):
            logits = _logits(states, weight, bias, part, temperature)
            inside, column = _inside(targets, part)
            chosen = torch.where(inside, logits.gather(1, column[:, None])[:, 0], chosen)
            highest = torch.maximum(peak, logits.amax(dim=1))
            shifted = logits.sub_(highest[:, None])
            powers = shifted.exp()
            shrink = (peak - highest).exp()
            # sum of p log p needs sum of e^z z, kept relative to the same peak as the sum of e^z.
            moment = shrink * (moment + total * (peak - highest)) + torch.linalg.vecdot(powers, shifted)
            total = shrink * total + powers.sum(dim=1)
            peak = highest
            kept = powers if size >= len(weight) else None
        log_total = total.log()
        normaliser = peak + log_total
        if kept is not None:
            kept = kept.div_(total[:, None])
        ctx.save_for_backward(states, weight, bias, targets, normaliser, kept)
        ctx.temperature, ctx.size = temperature, size
        entropy = log_total - moment / total
        ctx.mark_non_differentiable(entropy)
        return chosen - normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normaliser, kept = ctx.saved_tensors
        scaled = upstream / ctx.temperature
        to_states = torch.zeros_like(states, dtype=normaliser.dtype) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _parts(len(weight), ctx.size):
            if kept is None:
                logits = _logits(states, weight, bias, part, ctx.temperature)
                gradient = logits.sub_(normaliser[:, None]).exp_()
            else:
                gradient = kept
            gradient = gradient * -scaled[:, None]  # of the logits: (one-hot - p) / temperature, times upstream
            inside, column = _inside(targets, part)
            gradient.scatter_add_(1, column[:, None], (scaled * inside)[:, None])
            if to_bias is not None:
                to_bias[part] = gradient.sum(dim=0)
            gradient = gradient.to(states.dtype)
            if to_states is not None:
                to_states += gradient @ weight[part]
            if to_weight is not None:
                torch.mm(gradient.T, states, out=to_weight[part])
        return None if to_states is None else to_states.to(states.dtype), to_weight, to_bias, None, None, None


def _parts(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(size, start + step)) for start in range(0, size, step))


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, part: slice, temperature: float) -> Tensor:
    """(N, C) tempered logits of one chunk of the vocabulary, at least float32, in memory of their own."""
    logits = torch.nn.functional.linear(states, weight[part], None if bias is None else bias[part])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.div_(temperature) if temperature != 1.0 else logits


def _inside(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which targets (N,) lie in the chunk, and their columns there (0 for the others)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, (targets - part.start) * inside


def _call_as(
    module: nn.Module, forward: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Calls ``module``, hooks and all, with another forward for this once."""
    plain = vars(module).get("forward")
    module.forward = forward
    try:
        result: tuple[Tensor, Tensor] = module(states)
        return result
    finally:
        if plain is None:
            del module.forward
        else:
            module.forward = plain
