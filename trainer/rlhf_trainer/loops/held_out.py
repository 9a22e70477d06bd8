"""Replies to held-out prompts, shared out over the ranks and scored; the same everywhere and in every repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_trainer.algos.rewards import conservative
from rlhf_trainer.generate.base import Generator, Request, SampleKey, SamplingParams
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.rollout import Prompt, Scorer
from rlhf_trainer.randomness import Stream, generator

_ROWS_PER_PASS = 64  # between two signs of life

Rewards = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class HeldOutReplies:
    """Prompts in an order of the stream's own, and the draws of their replies: equal whoever samples them, so that
    two policies' replies to a prompt differ by the policies alone (common random numbers)."""

    session: Session
    inputs: PolicyInputs
    stream: Stream

    def prompts(self, count: int) -> list[Prompt]:
        """``count`` held-out prompts, all of them before any comes twice."""
        holdout = self.inputs.holdout_prompts
        order = generator(self.inputs.training.seed, self.stream).permutation(len(holdout))
        return [holdout[order[index % len(holdout)]] for index in range(count)]

    def score(self, sampler: Generator, prompts: Sequence[Prompt], scorers: Sequence[Rewards]) -> list[list[float]]:
        """Per scorer the rewards of one reply to each prompt [N], in order and on every rank. Collective."""
        world = self.session.world
        mine = list(range(world.rank, len(prompts), world.size))
        scored: list[tuple[int, tuple[float, ...]]] = []
        for start in range(0, -(-len(prompts) // world.size), _ROWS_PER_PASS):
            rows = mine[start : start + _ROWS_PER_PASS]
            if rows:
                scored += zip(rows, self._score(sampler, rows, [prompts[row] for row in rows], scorers), strict=True)
            self.session.pulse()
        whole = sorted(one for part in world.gather(scored) for one in part)
        return [[rewards[index] for _, rewards in whole] for index in range(len(scorers))]

    def _score(
        self, sampler: Generator, rows: Sequence[int], prompts: Sequence[Prompt], scorers: Sequence[Rewards]
    ) -> list[tuple[float, ...]]:
        training = self.inputs.training
        params = SamplingParams(training.generation.max_new_tokens, training.generation.temperature)
        requests = [
            Request(prompt.ids, SampleKey(training.seed, 0, row, self.stream))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        texts = [prompt.text for prompt in prompts]
        replies = [self.inputs.encoder.decode(done.tokens) for done in sampler.generate(requests, params)]
        return list(zip(*(scorer(texts, replies) for scorer in scorers), strict=True))


def as_optimised(scorer: Scorer, std_penalty: float) -> Rewards:
    """The reward that training maximises: mean - lambda * std over the ensemble."""

    def rewards(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
        found: list[float] = conservative(*scorer(prompts, replies), std_penalty).tolist()
        return found

    return rewards
