"""Lagrange multipliers: hand values, the closed-form optimum of a constrained bandit, state, and caps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.lagrangian import Multiplier, penalised
from rlhf_trainer.config import Constraint, Cost
from rlhf_trainer.loops.constraints import Constraints
from tests.trainer.bandit import ARMS, BETA, REWARDS, language_model, log_policy, play, training_of
from tests.trainer.ppo_world import experience_of

# The dear arms are the good ones, so that the constraint bites.
COSTS = (REWARDS.median() < REWARDS).float()
LIMIT = 0.4


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


def optimum(beta: float) -> tuple[float, Tensor]:
    """lambda* and log pi* of max E[r] - beta KL subject to E[c] <= LIMIT, by bisection: pi* ∝ pi_ref exp((r -
    lambda c) / beta), and its cost falls as lambda rises."""
    anchor = log_policy(language_model())
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        policy = torch.log_softmax(anchor + (REWARDS - middle * COSTS) / beta, -1)
        low, high = (middle, high) if float((policy.exp() * COSTS).sum()) > LIMIT else (low, middle)
    return low, policy


CONSTRAINT = {"cost": "safety", "limit": LIMIT, "initial_multiplier": 0.2, "learning_rate": 0.1, "window": 1}


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
    exact, best = optimum(BETA)
    assert 0.1 < exact < 3.0  # the constraint binds, and the cap does not
    played = play(training_of(**algorithm, constraints=[CONSTRAINT]), costs=COSTS, steps=300)
    policy = log_policy(played.policy)
    assert played.constraints.multipliers[Cost.SAFETY] == pytest.approx(exact, abs=0.02)
    assert float((policy.exp() * COSTS).sum()) == pytest.approx(LIMIT, abs=0.01)
    assert float((policy.exp() * (policy - best)).sum()) < 0.01


def test_without_the_constraint_the_cost_is_far_above_its_limit() -> None:
    """Negative control."""
    played = play(training_of(algorithm="RLOO"), costs=COSTS)
    assert float((log_policy(played.policy).exp() * COSTS).sum()) > LIMIT + 0.3


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
    assert len(COSTS) == ARMS
    assert not Constraints([])
    assert Constraints([]).figures(experience_of([[1]], [0.0])) == {}
