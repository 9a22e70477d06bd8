"""What every sampler promises, whichever engine draws the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_trainer.randomness import Stream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``temperature`` 0 is greedy; there is no top-k or top-p on purpose: both make the
    sampler's distribution differ from the one the trainer differentiates."""

    max_new_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or a positive number")


@dataclass(frozen=True)
class SampleKey:
    """Names one sample for ever: the same key draws the same uniforms on any rank, in any batch."""

    seed: int
    step: int
    sample: int
    stream: Stream = Stream.GENERATION


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]  # token ids, beginning-of-sequence included
    key: SampleKey


@dataclass(frozen=True)
class Completion:
    """``tokens`` ends with the end-of-sequence token iff ``finish_reason`` is "stop".

    ``logprobs[i]`` is log p(tokens[i]) under the tempered distribution it was drawn from (nats).
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class Generator(Protocol):
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in the order of the requests."""
        ...
