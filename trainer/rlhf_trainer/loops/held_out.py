"""Replies to held-out prompts, scored by reward models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_trainer.algos.rewards import conservative
from rlhf_trainer.generate.base import Generator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.replies import judged_replies
from rlhf_trainer.loops.rollout import Prompt, Scorer
from rlhf_trainer.randomness import Stream, generator

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

        def scored(texts: Sequence[str], replies: Sequence[str]) -> list[tuple[float, ...]]:
            return list(zip(*(scorer(texts, replies) for scorer in scorers), strict=True))

        whole = judged_replies(self.session, self.inputs, self.stream, sampler, prompts, scored)
        return [[rewards[index] for rewards in whole] for index in range(len(scorers))]


def as_optimised(scorer: Scorer, std_penalty: float) -> Rewards:
    """The reward that training maximises: mean - lambda * std over the ensemble."""

    def rewards(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
        found: list[float] = conservative(*scorer(prompts, replies), std_penalty).tolist()
        return found

    return rewards
