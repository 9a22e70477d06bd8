"""A bandit played through a real language model has a closed-form optimum; every online algorithm must get there.

With reward r and penalty beta the best policy is pi* ∝ pi_ref exp(r / beta), worth beta log Z. Minimising k1 or k3 as
a loss term, as several libraries did, follows another gradient and ends elsewhere: the negative controls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_trainer.algos.kl import k1, k3
from tests.trainer.bandit import BETA, REWARDS, LossTerm, Played, log_policy, play, training_of

PLAIN: dict[str, Any] = {"whiten_advantages": False, "gae_lambda": 1.0}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "PPO": {"algorithm": "PPO", "ppo": PLAIN},
    "PPO-whitened": {"algorithm": "PPO", "ppo": {"gae_lambda": 1.0}},
    "GRPO-none": {"algorithm": "GRPO", "grpo": {"scale": "none"}},
    "RLOO": {"algorithm": "RLOO"},
    "REINFORCE++": {"algorithm": "ReinforcePlusPlus"},
}
# Where a KL term of the loss meets advantages in units of reward.
KEEP_SCALE = {name: ALGORITHMS[name] for name in ("PPO", "GRPO-none", "RLOO")}
KEEP_SCALE["REINFORCE++-plain"] = {"algorithm": "ReinforcePlusPlus", "ppo": PLAIN}


def value(played: Played) -> tuple[float, float]:
    """E[r] - beta KL of the policy, and the best there is."""
    now, anchor = log_policy(played.policy), log_policy(played.reference)
    reached = float((now.exp() * (REWARDS - BETA * (now - anchor))).sum())
    return reached, BETA * float(torch.logsumexp(anchor + REWARDS / BETA, -1))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_kl_in_the_reward_reaches_the_closed_form_optimum(name: str) -> None:
    played = play(training_of(**ALGORITHMS[name]))
    assert played.distance() < 0.01
    reached, best = value(played)
    assert reached == pytest.approx(best, abs=0.002)
    anchor = log_policy(played.reference)
    assert float((anchor.exp() * REWARDS).sum()) < best - 0.1  # there was something to learn


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("name", KEEP_SCALE)
def test_k2_and_weighted_k3_in_the_loss_reach_it_too(name: str, estimator: str) -> None:
    training = training_of(**KEEP_SCALE[name], kl={"placement": "loss", "estimator": estimator})
    assert play(training).distance() < 0.01


@pytest.mark.parametrize("estimator", [k1, k3], ids=["k1", "k3"])
@pytest.mark.parametrize("name", ["PPO", "GRPO-none"])
def test_k1_and_plain_k3_as_losses_end_elsewhere(name: str, estimator: LossTerm) -> None:
    training = training_of(**ALGORITHMS[name], kl={"coefficient": 0.0})
    assert play(training, extra=lambda p, q: BETA * estimator(p, q)).distance() > 0.1


def test_without_a_penalty_the_policy_leaves_the_optimum_behind() -> None:
    """Negative control: the coefficient matters, and reward alone leads elsewhere."""
    assert play(training_of(**ALGORITHMS["RLOO"], kl={"coefficient": 0.0})).distance() > 0.1


def test_best_of_all_arms_learns_the_best_arm() -> None:
    """The best of n is the limit without KL: cross-entropy on the reward's argmax."""
    played = play(training_of(algorithm="BestOfN", kl={"coefficient": 0.0}))
    assert int(log_policy(played.policy).argmax()) == int(REWARDS.argmax())
    assert float(log_policy(played.policy).max().exp()) > 0.99


def test_best_of_n_ranks_by_reward_less_its_kl() -> None:
    """With a high price of KL in the reward the choice falls on another arm than the best rewarded."""
    played = play(training_of(algorithm="BestOfN", kl={"coefficient": 2.0}), steps=1, rate=0.0)
    assert int(log_policy(played.policy).argmax()) == int(log_policy(played.reference).argmax())
