"""Learning from each reply once, without a pass before it.

With one optimiser step per batch the policy that learns is the one that sampled: its log-probabilities come out of the
training pass itself, where the ratio is 1 whatever they are. What must be known before (a KL in the reward) is taken
from the sampler, which holds the same weights; that it does is checked afterwards, step by step.

PPO's advantages need the values of all replies before the first gradient, which no sampler has. Where one backward pass
holds the whole batch they come out of the training pass too, and advantages are estimated between its two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_trainer.config import Algorithm, GenerationEngine, PolicyTraining
from rlhf_trainer.distributed import World
from rlhf_trainer.loops.rollout import Experience, sampler_gap

# Best of n learns from some of the replies and reports on all.
_WITHOUT_CRITIC = (Algorithm.GRPO, Algorithm.RLOO, Algorithm.REINFORCE_PLUS_PLUS)


def learns_in_one_pass(training: PolicyTraining, backward_passes: int) -> bool:
    """``backward_passes``: of one rank per optimiser step."""
    once = training.ppo.epochs == training.ppo.mini_batches == 1
    # Another engine's numbers are its own: its replies are weighed by the trainer's before they are learnt from.
    own = training.generation.engine is GenerationEngine.LOCAL
    possible = training.algorithm in _WITHOUT_CRITIC or (needs_values(training) and backward_passes == 1)
    return once and own and possible


def needs_values(training: PolicyTraining) -> bool:
    """Whether advantages cannot be estimated from what was sampled alone."""
    return training.algorithm is Algorithm.PPO


class Measured:
    """Log-probs, values and entropies (B, T) as the training pass computes them, filled row by row."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._tokens = torch.zeros(3, *experience.sampled.shape)

    def add(self, rows: Sequence[int], *outputs: Tensor) -> None:
        """``outputs`` of the module for these rows: log-probs, values and entropies."""
        for kept, given in zip(self._tokens, outputs, strict=True):
            kept[list(rows), : given.shape[1]] = given.detach().cpu()

    def of_all_ranks(self, world: World) -> Experience:
        """The experience with what the ranks measured, each on rows of its own. Collective."""
        logprobs, values, entropies = torch.stack(world.gather(self._tokens)).sum(dim=0)
        gap = sampler_gap(self._experience.sampled, logprobs, self._experience.lengths)
        return replace(self._experience, logprobs=logprobs, values=values, entropies=entropies, sampler_gap=gap)
