"""The tensor functions against closed forms, hand values and slow obvious implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.advantages import Moments, whiten
from rlhf_trainer.algos.gae import gae
from rlhf_trainer.algos.kl import AdaptiveKL, FixedKL, k1, k3
from rlhf_trainer.algos.ppo import policy_loss, value_loss
from rlhf_trainer.algos.rewards import conservative, response_mask, token_rewards

LENGTHS = torch.tensor([5, 1, 3, 8])
WIDTH = 8


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(seed: int) -> tuple[Tensor, Tensor]:
    mask = response_mask(LENGTHS, WIDTH).double()
    return noise(seed, len(LENGTHS), WIDTH) * mask, mask


def slow_gae(rewards: Tensor, values: Tensor, length: int, gamma: float, lam: float) -> list[float]:
    """Equation 16 as it stands: the sum over all later steps of (gamma lambda)^l delta."""
    following = [*values[1:length].tolist(), 0.0]
    deltas = [float(rewards[t] + gamma * following[t] - values[t]) for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_double_sum(gamma: float, lam: float) -> None:
    (rewards, mask), (values, _) = masked(0), masked(1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = slow_gae(rewards[row], values[row], length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected)
    assert torch.equal(advantages * (1 - mask), torch.zeros_like(mask))
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_gae_without_discount_is_the_return_minus_the_value() -> None:
    (rewards, mask), (values, _) = masked(2), masked(3)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    torch.testing.assert_close(returns, to_go)


def test_gae_ignores_what_lies_after_the_end() -> None:
    (rewards, mask), (values, _) = masked(4), masked(5)
    spoiled = values + 100 * (1 - mask)
    clean, _ = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    dirty, _ = gae(rewards, spoiled, mask, gamma=0.9, lam=0.9)
    torch.testing.assert_close(clean, dirty)


def test_an_unchanged_policy_has_ratio_one() -> None:
    logprobs, mask = masked(6)
    advantages, _ = masked(7)
    loss = policy_loss(logprobs, logprobs, advantages, mask, clip=0.2, tokens=float(mask.sum()))
    assert loss.clipped_tokens == 0
    assert loss.approx_kl_sum == 0
    torch.testing.assert_close(loss.loss, -(advantages * mask).sum() / mask.sum())


def test_policy_loss_clips_only_where_it_would_gain() -> None:
    """One token per row: (ratio, advantage) → the textbook value of -min(rA, clip(r)A)."""
    cases = [(1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (0.5, -1.0, 0.8), (1.1, 2.0, -2.2)]
    for ratio, advantage, expected in cases:
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        one = torch.ones(1, 1)
        loss = policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one, clip=0.2, tokens=1.0)
        assert loss.loss.item() == pytest.approx(expected, rel=1e-6)
        loss.loss.backward()
        clipped = (ratio, advantage) in [(1.5, 1.0), (0.5, -1.0)]
        assert logprobs.grad is not None
        assert (logprobs.grad.item() == 0) == clipped
        assert int(loss.clipped_tokens) == int(clipped)


def test_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    one = torch.ones(1, 1)
    # Moving from 0 to 1 towards a return of 2: clipped to 0.2, so the error is the larger 1.8².
    assert value_loss(one, 0 * one, 2 * one, one, clip=0.2, tokens=1.0).item() == pytest.approx(0.5 * 1.8**2)
    # Overshooting to 3 from 1.9: plain error 1 beats the clipped 0.1.
    assert value_loss(3 * one, 1.9 * one, 2 * one, one, clip=0.2, tokens=1.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(parts: int) -> None:
    """Token counts are global, so slices of very different length add up to the whole."""
    start, mask = masked(8)
    old = start + 0.3 * noise(9, *start.shape)
    advantages, _ = masked(10)
    whole = start.clone().requires_grad_()
    tokens = float(mask.sum())
    policy_loss(whole, old, advantages, mask, clip=0.2, tokens=tokens).loss.backward()
    split = start.clone().requires_grad_()
    total = 0.0
    for rows in torch.arange(len(LENGTHS)).chunk(parts):
        width = int(LENGTHS[rows].max())  # each slice is padded to its own longest row
        each = (x[rows, :width] for x in (split, old, advantages, mask))
        loss = policy_loss(*each, clip=0.2, tokens=tokens).loss
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(split.grad, whole.grad)
    whole_loss = policy_loss(start, old, advantages, mask, clip=0.2, tokens=tokens).loss
    assert total == pytest.approx(whole_loss.item())


def test_local_means_would_depend_on_the_split() -> None:
    """Negative control: per-slice means, the usual mistake, give another gradient for these lengths."""
    start, mask = masked(8)
    advantages, _ = masked(10)
    whole = policy_loss(start, start, advantages, mask, clip=0.2, tokens=float(mask.sum())).loss
    halves = [
        policy_loss(start[r], start[r], advantages[r], mask[r], clip=0.2, tokens=float(mask[r].sum())).loss
        for r in torch.arange(len(LENGTHS)).chunk(2)
    ]
    assert abs(float(sum(halves) / 2 - whole)) > 5e-3


def test_whitening_by_summed_moments_is_whitening_of_the_whole() -> None:
    values, mask = masked(11)
    moments = Moments.of(values[:1], mask[:1]) + Moments.of(values[1:], mask[1:])
    white = whiten(values, mask, moments)
    kept = white[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-9)
    assert kept.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(white * (1 - mask), torch.zeros_like(mask))
    torch.testing.assert_close(white[:1], whiten(values[:1], mask[:1], moments))


def test_whitening_constant_values_gives_zeros_not_infinities() -> None:
    mask = torch.ones(2, 3)
    assert torch.equal(whiten(torch.full((2, 3), 4.0), mask, Moments.of(torch.full((2, 3), 4.0), mask)), 0 * mask)


def test_rewards_land_on_the_last_token_and_nowhere_else() -> None:
    lengths, finished = torch.tensor([3, 4, 1]), torch.tensor([True, False, True])
    scores, kl = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4)
    rewards = token_rewards(scores, kl, lengths, finished, kl_coefficient=0.5, missing_eos_penalty=0.25)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1.75], [3, 0, 0, 0]]


def test_kl_is_charged_on_every_response_token_and_on_no_padding() -> None:
    lengths = torch.tensor([2, 4])
    kl = torch.ones(2, 4)  # also where there is padding
    rewards = token_rewards(
        torch.zeros(2), kl, lengths, torch.tensor([True, True]), kl_coefficient=0.5, missing_eos_penalty=1.0
    )
    assert rewards.tolist() == [[-0.5, -0.5, 0, 0], [-0.5, -0.5, -0.5, -0.5]]


def test_the_ensemble_penalty_lowers_what_members_disagree_on() -> None:
    scores = conservative(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert scores.tolist() == [1.0, 0.0]


def test_kl_estimators_are_unbiased_and_k3_is_never_negative() -> None:
    p, q = torch.log_softmax(noise(12, 6), -1), torch.log_softmax(noise(13, 6), -1)
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * k1(p, q)).sum()) == pytest.approx(exact)
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(exact)
    assert bool((k3(p, q) >= 0).all())


def test_the_adaptive_controller_brings_a_responsive_system_to_its_target() -> None:
    """KL falls as the weight rises (KL = 1/weight); the controller must find weight = 1/target and stay."""
    for start in (0.01, 5.0):
        controller = AdaptiveKL(coefficient=start, target=4.0, horizon=640)
        for _ in range(600):
            controller.update(kl=1.0 / controller.coefficient, samples=64)
        assert 1.0 / controller.coefficient == pytest.approx(4.0, rel=1e-3)


def test_the_adaptive_controller_moves_at_most_a_fifth_per_horizon() -> None:
    controller = AdaptiveKL(coefficient=1.0, target=1.0, horizon=100)
    controller.update(kl=1e9, samples=100)
    assert controller.coefficient == pytest.approx(1.2)
    controller.update(kl=-1e9, samples=100)
    assert controller.coefficient == pytest.approx(1.2 * 0.8)


def test_the_fixed_controller_stays() -> None:
    controller = FixedKL(0.3)
    controller.update(kl=100.0, samples=64)
    assert controller.coefficient == 0.3
