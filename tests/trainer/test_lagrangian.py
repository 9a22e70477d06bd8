"""Lagrange multipliers: hand values, the closed-form optimum of a constrained bandit, state, and caps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.lagrangian import Multiplier, penalised
from rlhf_trainer.config import Constraint, Cost
from rlhf_trainer.loops.constraints import Constraints
from tests.trainer.bandit import ARMS, BETA, REPLIES, REWARDS, Played, language_model, log_policy, play, training_of
from tests.trainer.ppo_world import experience_of

# The dear arms are the good ones, so that the constraint bites; every other arm is cut short.
COSTS = {Cost.SAFETY: (REWARDS.median() < REWARDS).float(), Cost.INCOMPLETE: (torch.arange(ARMS) % 2 == 0).float()}
LIMITS = {Cost.SAFETY: 0.4, Cost.INCOMPLETE: 0.5}


def multiplier(**changes: Any) -> Multiplier:
    fields: dict[str, Any] = {"value": 1.0, "limit": 0.2, "learning_rate": 0.5, "maximum": 2.0, "window": 4}
    return Multiplier(**{**fields, **changes})


def test_the_multiplier_climbs_the_excess_of_the_window() -> None:
    one = multiplier()
    one.update([1.0, 1.0])
    assert one.value == pytest.approx(1.0 + 0.5 * 0.8)
    one.update([0.0, 0.0])
    assert one.value == pytest.approx(1.4 + 0.5 * (0.5 - 0.2))
    one.update([0.0, 0.0])  # the first two have left the window
    assert one.value == pytest.approx(1.55 - 0.5 * 0.2)


def test_the_multiplier_stays_between_zero_and_its_cap_and_says_when_that_is_not_enough() -> None:
    dear, cheap = multiplier(), multiplier(value=0.05)
    for _ in range(3):
        dear.update([1.0])
        cheap.update([0.0])
    assert (dear.value, dear.unsatisfied) == (2.0, True)
    assert (cheap.value, cheap.unsatisfied) == (0.0, False)
    dear.update([0.0, 0.0, 0.0, 0.0])
    assert not dear.unsatisfied


def test_penalised_rewards_by_hand() -> None:
    rewards, costs = torch.tensor([1.0, 2.0]), [torch.tensor([0.0, 1.0]), torch.tensor([3.0, 0.0])]
    assert penalised(rewards, costs, [0.5, 0.5]).tolist() == [-0.25, 0.75]
    assert torch.equal(penalised(rewards, [], []), rewards)
    with pytest.raises(ValueError, match="shorter"):
        penalised(rewards, costs, [0.5])  # a cost without its price would go unseen


def mean_cost(log_probs: Tensor, cost: Cost) -> float:
    return float(log_probs.exp() @ COSTS[cost])


def priced(anchor: Tensor, prices: Mapping[Cost, float]) -> Tensor:
    """log pi of the best policy at fixed prices: pi ∝ pi_ref exp((r - sum lambda_i c_i) / beta)"""
    worth = REWARDS - sum(price * COSTS[cost] for cost, price in prices.items())
    return torch.log_softmax(anchor + worth / BETA, -1)


def optimum(*costs: Cost) -> tuple[dict[Cost, float], Tensor]:
    """lambda* and log pi* of max E[r] - beta KL subject to every E[c_i] <= LIMITS[i]. A cost falls as its price rises,
    so each is found by bisection; in turns, as that is descent on the dual, which is convex."""
    anchor, prices = log_policy(language_model()), dict.fromkeys(costs, 0.0)
    for cost in costs * (12 if len(costs) > 1 else 1):
        low, high = 0.0, 10.0
        for _ in range(24):
            prices[cost] = (low + high) / 2
            too_dear = mean_cost(priced(anchor, prices), cost) > LIMITS[cost]
            low, high = (prices[cost], high) if too_dear else (low, prices[cost])
    return prices, priced(anchor, prices)


def constraint(cost: Cost) -> dict[str, Any]:
    """Whose window is one step's replies."""
    return {"cost": cost, "limit": LIMITS[cost], "initial_multiplier": 0.2, "learning_rate": 0.03, "window": REPLIES}


def assert_found(played: Played, *costs: Cost) -> None:
    """The run ended at the saddle point of these constraints, all of which bind, and none at its cap."""
    exact, best = optimum(*costs)
    policy = log_policy(played.policy)
    for cost, price in exact.items():
        assert 0.1 < price < 3.0
        assert played.constraints.multipliers[cost] == pytest.approx(price, abs=0.02)
        assert mean_cost(policy, cost) == pytest.approx(LIMITS[cost], abs=0.01)
    assert float((policy.exp() * (policy - best)).sum()) < 0.01


@pytest.mark.parametrize(
    "algorithm",
    [
        {"algorithm": "PPO"},
        {"algorithm": "GRPO", "grpo": {"scale": "none"}},
        {"algorithm": "RLOO"},
        {"algorithm": "GRPO", "grpo": {"scale": "none"}, "kl": {"placement": "loss", "estimator": "k3"}},
        {"algorithm": "ReinforcePlusPlus"},
    ],
    ids=lambda algorithm: "-".join(str(value) for value in algorithm.values()),
)
def test_every_algorithm_finds_the_saddle_point(algorithm: dict[str, Any]) -> None:
    played = play(training_of(**algorithm, constraints=[constraint(Cost.SAFETY)]), costs=COSTS)
    assert_found(played, Cost.SAFETY)


def test_two_binding_constraints_find_their_saddle_point() -> None:
    training = training_of(algorithm="RLOO", constraints=[constraint(cost) for cost in COSTS])
    played = play(training, costs=COSTS)
    assert_found(played, *COSTS)
    alone, _ = optimum(Cost.SAFETY)
    assert abs(played.constraints.multipliers[Cost.SAFETY] - alone[Cost.SAFETY]) > 0.05  # neither price is its own


def test_without_the_constraint_the_cost_is_far_above_its_limit() -> None:
    """Negative control."""
    played = play(training_of(algorithm="RLOO"), costs=COSTS)
    assert mean_cost(log_policy(played.policy), Cost.SAFETY) > LIMITS[Cost.SAFETY] + 0.3


def test_several_constraints_have_prices_of_their_own() -> None:
    constraints = Constraints(
        [
            Constraint(cost=Cost.SAFETY, limit=0.1),
            Constraint(cost=Cost.LENGTH, limit=2.0, learning_rate=0.01),
            Constraint(cost=Cost.INCOMPLETE, limit=0.5, max_multiplier=1.0),
        ]
    )
    experience = experience_of(
        [[1, 2, 3], [1]],
        [0.0, 0.0],
        violations=torch.tensor([1.0, 0.0]),
        finished=torch.tensor([False, False]),
    )
    assert constraints.figures(experience) == {
        "safetyCost": 0.5, "safetyMultiplier": 1.0, "lengthCost": 2.0, "lengthMultiplier": 1.0,
        "incompleteCost": 1.0, "incompleteMultiplier": 1.0, "unsatisfiedConstraints": 0.0,
    }  # fmt: skip
    constraints.update(experience)
    assert constraints.multipliers == pytest.approx({Cost.SAFETY: 1.04, Cost.LENGTH: 1.0, Cost.INCOMPLETE: 1.0})
    assert constraints.figures(experience)["unsatisfiedConstraints"] == 1.0


def test_multipliers_and_window_survive_a_checkpoint() -> None:
    given = [Constraint(cost=Cost.LENGTH, limit=2.0, window=3)]
    whole, resumed = Constraints(given), Constraints(given)
    for length in (1, 4, 2, 3):
        whole.update(experience_of([[0] * length], [0.0]))
    resumed.restore(json.loads(json.dumps(whole.state())))
    for constraints in (whole, resumed):
        constraints.update(experience_of([[0] * 5], [0.0]))
    assert resumed.state() == whole.state()


def test_an_unpriced_cost_changes_nothing() -> None:
    assert not Constraints([])
    assert Constraints([]).figures(experience_of([[1]], [0.0])) == {}
