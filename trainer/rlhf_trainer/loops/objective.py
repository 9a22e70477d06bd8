"""The loss of an online algorithm on part of a mini batch: policy term, KL term, value term, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_trainer.algos import normalization
from rlhf_trainer.algos.best_of_n import cross_entropy
from rlhf_trainer.algos.kl import k2_loss, k3, k3_loss
from rlhf_trainer.algos.ppo import Clip, policy_loss, value_loss
from rlhf_trainer.config import Algorithm, KLEstimator, LossNormalization, PolicyTraining
from rlhf_trainer.loops.estimators import Targets
from rlhf_trainer.loops.rollout import Experience

# Sums over this rank's tokens, in the order of ``Losses.sums``.
SUMS = ("policyLoss", "klLoss", "valueLoss", "clipFraction", "approxKl", "tokens")


@dataclass(frozen=True)
class Slice:
    """(B, T) tensors of the rows of one backward pass, cut to their longest response."""

    old: Tensor  # log-probs of the policy that sampled
    reference: Tensor
    values: Tensor  # of the critic that saw the sample first
    advantages: Tensor
    returns: Tensor
    weights: Tensor  # shares of the mini batch's mean
    corrections: Tensor

    @classmethod
    def of(
        cls,
        experience: Experience,
        targets: Targets,
        weights: Tensor,
        rows: Sequence[int],
        width: int,
        device: torch.device,
    ) -> Slice:
        """``weights`` (rows, T) belong to ``rows``; the other tensors to the whole batch."""

        def cut(values: Tensor) -> Tensor:
            return values[list(rows), :width].to(device)

        return cls(
            old=cut(experience.logprobs),
            reference=cut(experience.reference),
            values=cut(experience.values),
            advantages=cut(targets.advantages),
            returns=cut(targets.returns),
            weights=weights[:, :width].to(device),
            corrections=cut(targets.corrections),
        )


@dataclass(frozen=True)
class Losses:
    """``total`` carries the gradient: a share of the mini batch's loss. ``sums`` (6,) are figures, see ``SUMS``."""

    total: Tensor
    sums: Tensor


def loss_weights(lengths: Tensor, width: int, training: PolicyTraining) -> Tensor:
    """(B, T) of all rows of a mini batch, whichever rank trains them."""
    mode = training.loss_normalization
    if mode is LossNormalization.SEQUENCE:
        return normalization.per_sequence(lengths, width)
    if mode is LossNormalization.MAX_LENGTH:
        return normalization.per_max_length(lengths, width, training.generation.max_new_tokens)
    return normalization.per_token(lengths, width)


@dataclass(frozen=True)
class Objective:
    """``kl_coefficient`` weighs the KL term of the loss (0: the KL is in the reward); ``warming``: values alone."""

    training: PolicyTraining
    kl_coefficient: float
    warming: bool = False

    def __call__(self, logprobs: Tensor, values: Tensor, part: Slice) -> Losses:
        policy, clipped = self._policy_term(logprobs, part)
        kl = self._kl_term(logprobs, part)
        total = policy + self.kl_coefficient * kl
        if self.warming:
            total = 0.0 * total  # gradients of 0 rather than none: every ZeRO stage reduces the same tensors
        critic = torch.zeros_like(policy)
        if self.training.algorithm is Algorithm.PPO:
            ppo = self.training.ppo
            critic = value_loss(values, part.values, part.returns, part.weights, clip=ppo.value_clip)
            total = total + ppo.value_coefficient * critic
        inside = (part.weights > 0).float()
        moved = (k3(part.old, logprobs) * inside).sum()  # KL of the sampling policy from the present one
        return Losses(total, torch.stack([policy, kl, critic, clipped, moved, inside.sum()]).detach())

    def _policy_term(self, logprobs: Tensor, part: Slice) -> tuple[Tensor, Tensor]:
        """The policy's loss and the number of clipped tokens."""
        weights = part.weights * part.corrections
        if self.training.algorithm is Algorithm.BEST_OF_N:
            return cross_entropy(logprobs, weights), logprobs.new_zeros(())
        ppo = self.training.ppo
        high = ppo.clip if ppo.clip_high is None else ppo.clip_high
        surrogate = policy_loss(logprobs, part.old, part.advantages, weights, Clip(ppo.clip, high, ppo.dual_clip))
        return surrogate.loss, surrogate.clipped_tokens.to(surrogate.loss)

    def _kl_term(self, logprobs: Tensor, part: Slice) -> Tensor:
        if self.kl_coefficient == 0.0:
            return logprobs.new_zeros(())
        term = k2_loss if self.training.kl.estimator is KLEstimator.K2 else k3_loss
        return (term(logprobs, part.reference, part.old) * part.weights * part.corrections).sum()
