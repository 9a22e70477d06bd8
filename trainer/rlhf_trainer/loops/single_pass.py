"""Learning from each reply once, without a pass before it.

With one optimiser step per batch the policy that learns is the one that sampled: its log-probabilities come out of the
training pass itself, where the ratio is 1 whatever they are. What must be known before (a KL in the reward) is taken
from the sampler, which holds the same weights; that it does is checked afterwards, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_trainer.config import Algorithm, GenerationEngine, PolicyTraining
from rlhf_trainer.distributed import World
from rlhf_trainer.loops.rollout import Experience, sampler_gap

# PPO's advantages need values before the pass; best of n learns from some of the replies and reports on all.
_ALGORITHMS = (Algorithm.GRPO, Algorithm.RLOO, Algorithm.REINFORCE_PLUS_PLUS)


def learns_in_one_pass(training: PolicyTraining) -> bool:
    once = training.ppo.epochs == training.ppo.mini_batches == 1
    # Another engine's numbers are its own: its replies are weighed by the trainer's before they are learnt from.
    return once and training.algorithm in _ALGORITHMS and training.generation.engine is GenerationEngine.LOCAL


class Measured:
    """Log-probs and entropies (B, T) as the training pass computes them, filled row by row."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._logprobs, self._entropies = (torch.zeros_like(experience.sampled) for _ in range(2))

    def add(self, rows: Sequence[int], logprobs: Tensor, entropies: Tensor) -> None:
        width = logprobs.shape[1]
        self._logprobs[list(rows), :width] = logprobs.detach().cpu()
        self._entropies[list(rows), :width] = entropies.detach().cpu()

    def of_all_ranks(self, world: World) -> Experience:
        """The experience with what the ranks measured, each on rows of its own. Collective."""
        parts = world.gather((self._logprobs, self._entropies))
        logprobs, entropies = (torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True))
        gap = sampler_gap(self._experience.sampled, logprobs, self._experience.lengths)
        return replace(self._experience, logprobs=logprobs, entropies=entropies, sampler_gap=gap)
