"""A bandit played through a real language model has a closed-form optimum; the KL penalty must lead there.

With reward r and penalty beta the best policy is pi* ∝ pi_ref exp(r / beta), worth beta log Z. Minimising k1 or k3 as
a loss term, as several libraries did, follows another gradient and ends elsewhere: the negative controls. Every arm
is played in proportion to its probability, so gradients are exact and no noise blurs the ends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trainer.algos.gae import gae
from rlhf_trainer.algos.kl import k1, k3
from rlhf_trainer.algos.ppo import policy_loss
from rlhf_trainer.algos.rewards import token_rewards
from rlhf_trainer.models.policy import Batch, reference_logprobs, score_tokens

ARMS, BETA, STEPS = 16, 0.15, 200
PROMPT = (3, 1)
REWARDS = 2.0 * torch.rand(ARMS, generator=torch.Generator().manual_seed(1))
EVERY_ARM = Batch.of([PROMPT] * ARMS, [[arm] for arm in range(ARMS)], 0, torch.device("cpu"))
Estimator = Callable[[Tensor, Tensor], Tensor]


def language_model() -> LlamaForCausalLM:
    """One token of its vocabulary is a whole reply: an arm."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=ARMS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def log_policy(lm: LlamaForCausalLM) -> Tensor:
    """log pi of every arm [ARMS]"""
    return reference_logprobs(lm, EVERY_ARM, 1.0)[:, 0]


def optimum(reference: LlamaForCausalLM) -> Tensor:
    return torch.log_softmax(log_policy(reference) + REWARDS / BETA, -1)


def train(in_loss: Estimator | None = None) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(policy, reference) after training with the KL in the reward or, for the controls, as a term of the loss."""
    policy, reference = language_model(), language_model().requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(policy, reference, in_loss))
        optimizer.step()
        schedule.step()
    return policy, reference


def loss_of(policy: LlamaForCausalLM, reference: LlamaForCausalLM, in_loss: Estimator | None) -> Tensor:
    """The expected loss: every arm once, weighted by its probability under the sampling policy."""
    logprobs = score_tokens(policy, EVERY_ARM, 1.0).logprobs
    old, mask = logprobs.detach(), EVERY_ARM.mask()
    anchor = reference_logprobs(reference, EVERY_ARM, 1.0)
    rewards = token_rewards(
        REWARDS,
        k1(old, anchor),
        EVERY_ARM.lengths,
        torch.ones(ARMS, dtype=torch.bool),
        kl_coefficient=0.0 if in_loss else BETA,
        missing_eos_penalty=1.0,
    )
    baseline = (old.exp() * rewards).sum().expand_as(rewards)
    advantages, _ = gae(rewards, baseline, mask, gamma=1.0, lam=1.0)
    loss = policy_loss(logprobs, old, old.exp() * advantages, mask, clip=0.2, tokens=1.0).loss
    return loss if in_loss is None else loss + BETA * (old.exp() * in_loss(logprobs, anchor)).sum()


def distance(policy: LlamaForCausalLM, reference: LlamaForCausalLM) -> float:
    """KL(pi‖pi*)"""
    now = log_policy(policy)
    return float((now.exp() * (now - optimum(reference))).sum())


def test_kl_in_the_reward_reaches_the_closed_form_optimum() -> None:
    policy, reference = train()
    assert distance(policy, reference) < 0.01
    now, anchor = log_policy(policy), log_policy(reference)
    value = float((now.exp() * (REWARDS - BETA * (now - anchor))).sum())
    best = BETA * float(torch.logsumexp(anchor + REWARDS / BETA, -1))
    assert value == pytest.approx(best, abs=0.002)
    assert float((anchor.exp() * REWARDS).sum()) < best - 0.1  # there was something to learn


def test_squared_log_ratio_as_a_loss_reaches_it_too() -> None:
    """Positive control: k2's gradient is that of the KL, so the set-up is fair to loss terms."""
    assert distance(*train(lambda p, q: 0.5 * k1(p, q) ** 2)) < 0.01


@pytest.mark.parametrize("estimator", [k1, k3], ids=["k1", "k3"])
def test_k1_and_k3_as_losses_end_elsewhere(estimator: Estimator) -> None:
    assert distance(*train(estimator)) > 0.1
