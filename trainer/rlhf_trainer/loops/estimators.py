"""From one step's experience to what its mini batches learn from: one small function per online algorithm.

All work on the whole batch of all ranks, so that groups are whole and every moment is global.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_trainer.algos import advantages as adv
from rlhf_trainer.algos.best_of_n import best_rows
from rlhf_trainer.algos.gae import gae, returns_to_go
from rlhf_trainer.algos.importance import truncated_weights
from rlhf_trainer.algos.lagrangian import penalised
from rlhf_trainer.algos.rewards import overlong, response_mask, sequence_rewards, token_rewards, without_end
from rlhf_trainer.config import AdvantageScale, Algorithm, Cost, GenerationEngine, KLPlacement, PolicyTraining
from rlhf_trainer.loops.constraints import cost_of
from rlhf_trainer.loops.rollout import Experience


@dataclass(frozen=True)
class Prices:
    """What the objective takes off a reward in this step: per nat of KL, and per unit of each cost."""

    kl: float
    multipliers: Mapping[Cost, float] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What the Lagrangian is divided by."""
        return 1.0 + sum(self.multipliers.values())


@dataclass(frozen=True)
class Targets:
    """(B, T) tensors of the whole batch; ``rows`` are those to learn from (all but for BestOfN)."""

    rows: Tensor
    outcomes: Tensor  # (B,) what a reply is worth, before KL
    advantages: Tensor
    returns: Tensor  # of the critic; 0 without one
    mask: Tensor
    corrections: Tensor  # importance weights where the sampler is not the trainer; else 1


def estimate(experience: Experience, training: PolicyTraining, prices: Prices) -> Targets:
    """What ``training.algorithm`` makes of the experience."""
    outcomes = _outcomes(experience, training, prices)
    mask = response_mask(experience.lengths, experience.logprobs.shape[1])
    rows, advantages, returns = _ESTIMATORS[training.algorithm](experience, training, prices, outcomes, mask)
    corrections = torch.ones_like(mask)
    if training.generation.engine is not GenerationEngine.LOCAL:
        corrections = truncated_weights(experience.logprobs, experience.sampled, mask)
    return Targets(rows, outcomes, advantages, returns, mask, corrections)


def kl_loss_coefficient(training: PolicyTraining, prices: Prices) -> float:
    """Weight of the KL term in the loss: 0 with the KL in the reward. Where advantages keep the reward's scale they
    were divided by that of the Lagrangian, and the term must be too; normalised ones have lost that scale."""
    if training.kl.placement is KLPlacement.REWARD:
        return 0.0
    return prices.kl if _normalised(training) else prices.kl / prices.scale


def _normalised(training: PolicyTraining) -> bool:
    """Whether what the policy term is weighed with has lost the scale of the reward."""
    if training.algorithm in (Algorithm.PPO, Algorithm.REINFORCE_PLUS_PLUS):
        return training.ppo.whiten_advantages
    if training.algorithm is Algorithm.GRPO:
        return training.grpo.scale is not AdvantageScale.NONE
    return training.algorithm is Algorithm.BEST_OF_N


def _outcomes(experience: Experience, training: PolicyTraining, prices: Prices) -> Tensor:
    """(B,) the reward model's score after whitening, length penalties and the prices of constraints."""
    scores = adv.rescale(experience.scores) if training.ppo.whiten_rewards else experience.scores
    scores = scores - without_end(experience.finished, training.missing_eos_penalty)
    if training.overlong is not None:
        limit = training.generation.max_new_tokens
        scores = scores - overlong(
            experience.lengths, start=training.overlong.start, longest=limit, penalty=training.overlong.penalty
        )
    costs = [cost_of(cost, experience) for cost in prices.multipliers]
    return penalised(scores, costs, list(prices.multipliers.values()))


def _kl_in_reward(training: PolicyTraining, prices: Prices) -> float:
    """The KL is part of the reward, not a cost, so the Lagrangian's divisor applies to it."""
    return prices.kl / prices.scale if training.kl.placement is KLPlacement.REWARD else 0.0


_Estimate = tuple[Tensor, Tensor, Tensor]  # rows, advantages, returns


def _ppo(experience: Experience, training: PolicyTraining, prices: Prices, outcomes: Tensor, mask: Tensor) -> _Estimate:
    coefficient = _kl_in_reward(training, prices)
    rewards = token_rewards(outcomes, experience.kl, experience.lengths, kl_coefficient=coefficient)
    raw, returns = gae(rewards, experience.values, mask, gamma=training.ppo.gamma, lam=training.ppo.gae_lambda)
    return _every_row(mask), _whitened(raw, mask, training), returns


def _reinforce(
    experience: Experience, training: PolicyTraining, prices: Prices, outcomes: Tensor, mask: Tensor
) -> _Estimate:
    """REINFORCE++ (Hu et al. 2025): PPO's token rewards and clipping, the batch's moments in place of a critic."""
    coefficient = _kl_in_reward(training, prices)
    rewards = token_rewards(outcomes, experience.kl, experience.lengths, kl_coefficient=coefficient)
    raw = returns_to_go(rewards, mask, gamma=training.ppo.gamma)
    return _every_row(mask), _whitened(raw, mask, training), torch.zeros_like(mask)


def _grpo(
    experience: Experience, training: PolicyTraining, prices: Prices, outcomes: Tensor, mask: Tensor
) -> _Estimate:
    relative = {
        AdvantageScale.GROUP: adv.group_relative,
        AdvantageScale.BATCH: adv.batch_relative,
        AdvantageScale.NONE: adv.centred,
    }[training.grpo.scale]
    return _of_sequences(relative, experience, training, prices, outcomes, mask)


def _rloo(
    experience: Experience, training: PolicyTraining, prices: Prices, outcomes: Tensor, mask: Tensor
) -> _Estimate:
    return _of_sequences(adv.leave_one_out, experience, training, prices, outcomes, mask)


def _best_of_n(
    experience: Experience, training: PolicyTraining, prices: Prices, outcomes: Tensor, mask: Tensor
) -> _Estimate:
    """Only the best sample of each prompt is learnt from, with the cross-entropy of ``objective``."""
    coefficient = _kl_in_reward(training, prices)
    ranked = sequence_rewards(outcomes, experience.kl, experience.lengths, kl_coefficient=coefficient)
    return best_rows(ranked, training.samples_per_prompt), torch.zeros_like(mask), torch.zeros_like(mask)


def _of_sequences(
    relative: Callable[[Tensor, int], Tensor],
    experience: Experience,
    training: PolicyTraining,
    prices: Prices,
    outcomes: Tensor,
    mask: Tensor,
) -> _Estimate:
    """A whole reply is one action: every token gets the reply's advantage among the samples of its prompt."""
    coefficient = _kl_in_reward(training, prices)
    rewards = sequence_rewards(outcomes, experience.kl, experience.lengths, kl_coefficient=coefficient)
    advantages = relative(rewards, training.samples_per_prompt)
    return _every_row(mask), advantages[:, None] * mask, torch.zeros_like(mask)


def _whitened(raw: Tensor, mask: Tensor, training: PolicyTraining) -> Tensor:
    return adv.whiten(raw, mask, adv.Moments.of(raw, mask)) if training.ppo.whiten_advantages else raw


def _every_row(mask: Tensor) -> Tensor:
    return torch.arange(len(mask))


_ESTIMATORS: Mapping[Algorithm, Callable[[Experience, PolicyTraining, Prices, Tensor, Tensor], _Estimate]] = {
    Algorithm.PPO: _ppo,
    Algorithm.REINFORCE_PLUS_PLUS: _reinforce,
    Algorithm.GRPO: _grpo,
    Algorithm.RLOO: _rloo,
    Algorithm.BEST_OF_N: _best_of_n,
}
