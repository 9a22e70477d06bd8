"""Replies to prompts outside of training, shared out over the ranks; the same everywhere and in every repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf_trainer.generate.base import Generator, Request, SampleKey, SamplingParams
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.randomness import Stream

_ROWS_PER_PASS = 64  # between two signs of life
T = TypeVar("T")
Judge = Callable[[Sequence[str], Sequence[str]], Sequence[T]]  # of prompts and the reply to each


def judged_replies(
    session: Session,
    inputs: PolicyInputs,
    stream: Stream,
    sampler: Generator,
    prompts: Sequence[Prompt],
    judge: Judge[T],
) -> list[T]:
    """What the judge finds in one reply to each prompt, sampled as in training, in order and on every rank. Collective.

    A draw is named by the stream and the place of its prompt: whoever samples, and on however many ranks."""
    world = session.world
    mine = list(range(world.rank, len(prompts), world.size))
    found: list[tuple[int, T]] = []
    for start in range(0, -(-len(prompts) // world.size), _ROWS_PER_PASS):
        rows = mine[start : start + _ROWS_PER_PASS]
        if rows:
            asked = [prompts[row] for row in rows]
            replies = _replies(inputs, stream, sampler, asked, rows)
            found += zip(rows, judge([prompt.text for prompt in asked], replies), strict=True)
        session.pulse()
    whole = sorted((one for part in world.gather(found) for one in part), key=lambda one: one[0])
    return [value for _, value in whole]


def _replies(
    inputs: PolicyInputs, stream: Stream, sampler: Generator, prompts: Sequence[Prompt], rows: Sequence[int]
) -> list[str]:
    training = inputs.training
    params = SamplingParams(training.generation.max_new_tokens, training.generation.temperature)
    requests = [
        Request(prompt.ids, SampleKey(training.seed, 0, row, stream)) for prompt, row in zip(prompts, rows, strict=True)
    ]
    return [inputs.encoder.decode(done.tokens) for done in sampler.generate(requests, params)]
