"""Critic-free advantages, best of n and sampler correction: hand values, and exact gradients by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.advantages import (
    batch_relative,
    centred,
    equal_groups,
    group_relative,
    leave_one_out,
    rescale,
)
from rlhf_trainer.algos.best_of_n import best_rows, cross_entropy
from rlhf_trainer.algos.importance import ratios, spread, truncated_weights

SCORES = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])  # two groups of three


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out(SCORES, 3).tolist() == [1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0]


def test_group_relative_by_hand() -> None:
    assert centred(SCORES, 3).tolist() == [-2, -1, 3, 0, 0, 0]
    deviation = math.sqrt((4 + 1 + 9) / 2)
    assert group_relative(SCORES, 3).tolist() == pytest.approx(
        [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0], rel=1e-4
    )
    deviation = math.sqrt((6.25 + 2.25 + 6.25 + 3 * 0.25) / 5)  # of all six, around 3.5
    assert batch_relative(SCORES, 3).tolist() == pytest.approx(
        [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0], rel=1e-4
    )


@pytest.mark.parametrize("scaled", [group_relative, batch_relative])
def test_differences_far_below_the_scale_of_rewards_are_not_blown_up(scaled: Callable[[Tensor, int], Tensor]) -> None:
    """A deviation of 1.4e-4 is noise: 1e-4 beside it holds the advantages well below one."""
    deviation = math.sqrt(2) * 1e-4
    expected = 1e-4 / (deviation + 1e-4)
    assert scaled(torch.tensor([0.0, 2e-4]), 2).tolist() == pytest.approx([-expected, expected], rel=1e-4)
    assert scaled(torch.full((4,), 0.3), 2).tolist() == [0, 0, 0, 0]


def test_groups_of_equal_scores_are_counted() -> None:
    assert equal_groups(SCORES, 3) == 0.5
    assert equal_groups(torch.tensor([1.0, 1.0, 2.0, 2.5]), 2) == 0.5
    assert equal_groups(SCORES, 1) == 0.0  # the batch is not all equal
    assert equal_groups(torch.ones(4), 1) == 1.0


def test_rescaled_scores_keep_their_mean() -> None:
    scores = rescale(SCORES)
    assert float(scores.mean()) == pytest.approx(3.5)
    assert float(scores.std(unbiased=False)) == pytest.approx(1.0)
    torch.testing.assert_close(rescale(10 * SCORES) - 35, scores - 3.5)


LOGITS = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)


def enumerated_gradient(advantages: Callable[[Tensor, int], Tensor], group: int, rewards: Tensor = REWARDS) -> Tensor:
    """E[1/n sum_i A_i grad log pi(a_i)] over every possible group of n samples of a three-armed bandit."""
    policy = LOGITS.softmax(-1)
    total = torch.zeros_like(LOGITS)
    for arms in product(range(3), repeat=group):
        each = advantages(rewards[list(arms)], group)
        gradient = sum(a * (torch.eye(3, dtype=torch.float64)[arm] - policy) for a, arm in zip(each, arms, strict=True))
        total += policy[list(arms)].prod() * gradient / group
    return total


def exact_gradient(rewards: Tensor = REWARDS) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)
    return gradient


def turned(advantages: Callable[[Tensor, int], Tensor]) -> float:
    """1 - cosine of the gradient over all groups of three and the exact one."""
    rewards = torch.tensor([1.0, 0.0, 0.9], dtype=torch.float64)
    found, exact = enumerated_gradient(advantages, 3, rewards), exact_gradient(rewards)
    return 1.0 - float(torch.cosine_similarity(found, exact, dim=0))


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_is_the_exact_policy_gradient(group: int) -> None:
    torch.testing.assert_close(enumerated_gradient(leave_one_out, group), exact_gradient())


@pytest.mark.parametrize("group", [2, 3, 4])
def test_centred_advantages_are_the_exact_gradient_shrunk(group: int) -> None:
    """A sample is part of its own baseline, which costs a factor (n - 1) / n and no direction."""
    torch.testing.assert_close(enumerated_gradient(centred, group), exact_gradient() * (group - 1) / group)


def test_dividing_by_the_group_deviation_turns_the_gradient() -> None:
    """Negative control, and why scale none is the unbiased choice: a group that hardly differs counts as much
    as one that does."""
    assert turned(group_relative) > 0.1
    assert turned(leave_one_out) < 1e-12


def test_the_best_row_of_each_group_is_chosen_and_the_first_of_equals() -> None:
    assert best_rows(SCORES, 3).tolist() == [2, 3]
    assert best_rows(torch.tensor([0.0, 5.0, 5.0, -3.0, -2.0, -2.0]), 3).tolist() == [1, 4]


def test_cross_entropy_sums_weighted_log_probabilities() -> None:
    logprobs = torch.log(torch.tensor([[0.5, 0.25], [0.1, 1.0]]))
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    assert cross_entropy(logprobs, weights).item() == pytest.approx(math.log(2) / 2 + math.log(4) / 2)


def test_importance_weights_are_ratios_cut_at_the_cap() -> None:
    trainer = torch.log(torch.tensor([[0.5, 0.9, 0.2]]))
    sampler = torch.log(torch.tensor([[0.5, 0.1, 0.4]]))
    mask = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(truncated_weights(trainer, sampler, mask), torch.tensor([[1.0, 2.0, 0.5]]))
    masked = ratios(trainer, sampler, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(masked, torch.tensor([[1.0, 1.0, 0.5]]))
    assert spread(masked.requires_grad_(), torch.tensor([[1.0, 0.0, 1.0]])) == pytest.approx((0.75, 0.975))


def test_a_batch_of_many_tokens_has_a_spread_too() -> None:
    """torch.quantile takes 2^24 numbers at most: 512 prompts of 16 replies of 2,048 tokens are as many."""
    tokens = torch.ones(2, 2**23 + 1)
    tokens[0] = 3.0
    assert spread(tokens, torch.ones_like(tokens)) == (2.0, 3.0)


def test_importance_weights_undo_a_foreign_sampler() -> None:
    """E_q[p/q f] = E_p[f] where the cap does not bite; without weights the mean is that of q."""
    p, q = LOGITS.log_softmax(-1), (LOGITS + torch.tensor([0.2, -0.1, 0.1])).log_softmax(-1)
    weights = truncated_weights(p, q, torch.ones(3))
    assert float((q.exp() * weights * REWARDS).sum()) == pytest.approx(float((p.exp() * REWARDS).sum()))
    assert abs(float((q.exp() * REWARDS).sum() - (p.exp() * REWARDS).sum())) > 0.02
