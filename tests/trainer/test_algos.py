"""The tensor functions against closed forms, hand values and slow obvious implementations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.advantages import Moments, whiten
from rlhf_trainer.algos.gae import gae, returns_to_go
from rlhf_trainer.algos.kl import AdaptiveKL, FixedKL, k1, k2_loss, k3, k3_loss
from rlhf_trainer.algos.normalization import per_max_length, per_sequence, per_token
from rlhf_trainer.algos.ppo import Clip, policy_loss, value_loss
from rlhf_trainer.algos.rewards import (
    conservative,
    overlong,
    response_mask,
    sequence_rewards,
    token_rewards,
    without_end,
)
from tests.trainer.closed_forms import LENGTHS, WIDTH, gae_error, masked, noise


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_double_sum(gamma: float, lam: float) -> None:
    assert gae_error(gamma, lam) < 1e-12
    (rewards, mask), (values, _) = masked(0), masked(1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert torch.equal(advantages * (1 - mask), torch.zeros_like(mask))
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_gae_with_another_lambda_is_told_apart() -> None:
    assert gae_error(1.0, 0.95, taken=0.9) > 0.05


def test_gae_without_discount_is_the_return_minus_the_value() -> None:
    (rewards, mask), (values, _) = masked(2), masked(3)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    torch.testing.assert_close(returns, to_go)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_are_the_discounted_sum_of_what_follows(gamma: float) -> None:
    rewards, mask = masked(14)
    returns = returns_to_go(rewards, mask, gamma=gamma)
    for row, length in enumerate(LENGTHS.tolist()):
        slow = [sum(gamma ** (k - t) * float(rewards[row, k]) for k in range(t, length)) for t in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(slow)
    assert torch.equal(returns * (1 - mask), torch.zeros_like(mask))


def test_gae_ignores_what_lies_after_the_end() -> None:
    (rewards, mask), (values, _) = masked(4), masked(5)
    spoiled = values + 100 * (1 - mask)
    clean, _ = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    dirty, _ = gae(rewards, spoiled, mask, gamma=0.9, lam=0.9)
    torch.testing.assert_close(clean, dirty)


PLAIN = Clip(0.2, 0.2)


def test_an_unchanged_policy_has_ratio_one() -> None:
    logprobs, mask = masked(6)
    advantages, _ = masked(7)
    loss = policy_loss(logprobs, logprobs, advantages, mask / mask.sum(), PLAIN)
    assert loss.clipped_tokens == 0
    torch.testing.assert_close(loss.loss, -(advantages * mask).sum() / mask.sum())


CASES = [  # clip, ratio, advantage, textbook value of the loss, whether the gradient is cut
    (PLAIN, 1.5, 1.0, -1.2, True),
    (PLAIN, 0.5, 1.0, -0.5, False),
    (PLAIN, 1.5, -1.0, 1.5, False),
    (PLAIN, 0.5, -1.0, 0.8, True),
    (PLAIN, 1.1, 2.0, -2.2, False),
    (Clip(0.2, 0.6), 1.5, 1.0, -1.5, False),  # clip-higher lets it rise
    (Clip(0.2, 0.6), 1.7, 1.0, -1.6, True),
    (Clip(0.2, 0.6), 0.5, -1.0, 0.8, True),  # the lower bound is its own
    (Clip(0.2, 0.2, 3.0), 5.0, -1.0, 3.0, True),  # dual clip bounds what plain PPO leaves unbounded
    (PLAIN, 5.0, -1.0, 5.0, False),
    (Clip(0.2, 0.2, 3.0), 5.0, 1.0, -1.2, True),  # and leaves A > 0 alone
    (Clip(0.2, 0.2, 3.0), 5.0, 0.5, -0.6, True),
]


@pytest.mark.parametrize(("clip", "ratio", "advantage", "expected", "cut"), CASES)
def test_policy_loss_clips_only_where_it_would_gain(
    clip: Clip, ratio: float, advantage: float, expected: float, cut: bool
) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss = policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one, clip)
    assert loss.loss.item() == pytest.approx(expected, rel=1e-6)
    loss.loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.item() == 0) == cut
    assert int(loss.clipped_tokens) == int(cut)


def test_what_stands_on_padding_never_reaches_the_loss() -> None:
    """Not even where exp() of it is infinite, and infinity times a weight of 0 no number."""
    logprobs, mask = masked(6)
    advantages, _ = masked(7)
    spoiled = (logprobs + 1e4 * (1 - mask)).requires_grad_()
    clean = policy_loss(logprobs, logprobs, advantages, mask / mask.sum(), PLAIN)
    dirty = policy_loss(spoiled, logprobs, advantages + 1 - mask, mask / mask.sum(), PLAIN)
    torch.testing.assert_close(dirty.loss, clean.loss)
    dirty.loss.backward()
    assert spoiled.grad is not None
    assert torch.equal(spoiled.grad * (1 - mask), torch.zeros_like(mask))


VALUES = [  # value, value before, return, error that counts
    (1.0, 0.0, 2.0, 1.8),  # moved by 1 towards the return: clipped to 0.2, the larger error
    (-1.0, 0.0, -2.0, 1.8),  # the same downwards
    (3.0, 1.9, 2.0, 1.0),  # overshot: the plain error beats the clipped 0.1
    (3.0, 1.9, 1.0, 2.0),
    (1.1, 1.0, 0.0, 1.1),  # within the clip both are one
]


@pytest.mark.parametrize(("value", "before", "target", "error"), VALUES)
def test_value_loss_takes_the_worse_of_plain_and_clipped(
    value: float, before: float, target: float, error: float
) -> None:
    one = torch.ones(1, 1)
    loss = value_loss(value * one, before * one, target * one, one, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * error**2)


def test_token_weights_share_out_one_mean_in_three_ways() -> None:
    lengths = torch.tensor([1, 3])
    assert per_token(lengths, 4).tolist() == [[0.25, 0, 0, 0], [0.25, 0.25, 0.25, 0]]
    torch.testing.assert_close(per_sequence(lengths, 4), torch.tensor([[1 / 2, 0, 0, 0], [1 / 6, 1 / 6, 1 / 6, 0]]))
    torch.testing.assert_close(per_max_length(lengths, 4, 10), response_mask(lengths, 4) / 20)


WEIGHTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token": per_token,
    "sequence": per_sequence,
    "maxLength": lambda lengths, width: per_max_length(lengths, width, WIDTH),
}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("normalization", WEIGHTS)
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(parts: int, normalization: str) -> None:
    """Counts are global, so slices of very different length add up to the whole."""
    start, _ = masked(8)
    old = start + 0.3 * noise(9, *start.shape)
    advantages, _ = masked(10)
    weights = WEIGHTS[normalization](LENGTHS, WIDTH)
    whole = start.clone().requires_grad_()
    whole_loss = policy_loss(whole, old, advantages, weights, PLAIN).loss
    whole_loss.backward()
    split = start.clone().requires_grad_()
    total = 0.0
    for rows in torch.arange(len(LENGTHS)).chunk(parts):
        width = int(LENGTHS[rows].max())  # each slice is padded to its own longest row
        each = (x[rows, :width] for x in (split, old, advantages, weights))
        loss = policy_loss(*each, PLAIN).loss
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(split.grad, whole.grad)
    assert total == pytest.approx(whole_loss.item())


def test_local_means_would_depend_on_the_split() -> None:
    """Negative control: per-slice means, the usual mistake, give another gradient for these lengths."""
    start, _ = masked(8)
    advantages, _ = masked(10)
    whole = policy_loss(start, start, advantages, per_token(LENGTHS, WIDTH), PLAIN).loss
    halves = [
        policy_loss(start[r], start[r], advantages[r], per_token(LENGTHS[r], WIDTH), PLAIN).loss
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
    """Ended by end of sequence, cut by the limit, and one token long: the last token is found by length alone."""
    lengths = torch.tensor([3, 4, 1])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4), lengths, kl_coefficient=0.5)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [3, 0, 0, 0]]
    slice_of_shorter = token_rewards(torch.tensor([1.0]), torch.zeros(1, 4), lengths[:1], kl_coefficient=0.5)
    assert slice_of_shorter.tolist() == [[0, 0, 1, 0]]


def test_kl_is_charged_on_every_response_token_and_on_no_padding() -> None:
    lengths = torch.tensor([2, 4])
    kl = torch.ones(2, 4)  # also where there is padding
    rewards = token_rewards(torch.zeros(2), kl, lengths, kl_coefficient=0.5)
    assert rewards.tolist() == [[-0.5, -0.5, 0, 0], [-0.5, -0.5, -0.5, -0.5]]
    assert sequence_rewards(torch.ones(2), kl, lengths, kl_coefficient=0.5).tolist() == [0.0, -1.0]


def test_a_reply_without_an_end_and_a_long_one_are_penalised() -> None:
    assert without_end(torch.tensor([True, False]), 0.25).tolist() == [0.0, 0.25]
    lengths = torch.tensor([3, 4, 6, 8, 9])
    assert overlong(lengths, start=4, longest=8, penalty=2.0).tolist() == [0.0, 0.0, 1.0, 2.0, 2.0]


def test_the_ensemble_penalty_lowers_what_members_disagree_on() -> None:
    scores = conservative(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert scores.tolist() == [1.0, 0.0]


def test_kl_estimators_are_unbiased_and_k3_is_never_negative() -> None:
    p, q = torch.log_softmax(noise(12, 6), -1), torch.log_softmax(noise(13, 6), -1)
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * k1(p, q)).sum()) == pytest.approx(exact)
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(exact)
    assert bool((k3(p, q) >= 0).all())


def expected_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], stale: float) -> tuple[Tensor, Tensor]:
    """Gradient in the logits of a KL term, exactly in expectation over samples of an older policy, and of KL(p‖q)."""
    logits = noise(12, 6).requires_grad_()
    reference = torch.log_softmax(noise(13, 6), -1)
    old = torch.log_softmax(logits.detach() + stale * noise(14, 6), -1)
    (found,) = torch.autograd.grad((old.exp() * loss(logits.log_softmax(-1), reference, old)).sum(), logits)
    p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - reference)).sum(), logits)
    return found, exact


@pytest.mark.parametrize("stale", [0.0, 0.5])
@pytest.mark.parametrize("loss", [k2_loss, k3_loss])
def test_kl_losses_have_the_gradient_of_the_kl_also_off_policy(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], stale: float
) -> None:
    found, exact = expected_gradient(loss, stale)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("loss", [k1, k3])
def test_the_bare_estimators_do_not(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Negative control."""
    found, exact = expected_gradient(lambda p, q, _old: loss(p, q), 0.0)
    assert float((found - exact).norm() / exact.norm()) > 0.2


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
    controller.update(kl=1e9, samples=25)
    assert controller.coefficient == pytest.approx(1.2 * 0.8 * 1.05), "a quarter of the horizon, a quarter of the way"


def test_a_batch_beyond_the_horizon_corrects_by_no_more_and_never_turns_the_sign() -> None:
    """1024 prompts of 16 samples, the default horizon: 1 - 0.2 * 16384 / 2000 would be -0.64, a reward for KL."""
    controller = AdaptiveKL(coefficient=0.05, target=6.0, horizon=2000)
    controller.update(kl=0.0, samples=16 * 1024)
    assert controller.coefficient == pytest.approx(0.05 * 0.8)
    controller.update(kl=1e9, samples=16 * 1024)
    assert controller.coefficient == pytest.approx(0.05 * 0.8 * 1.2)


def test_the_fixed_controller_stays() -> None:
    controller = FixedKL(0.3)
    controller.update(kl=100.0, samples=64)
    assert controller.coefficient == 0.3
