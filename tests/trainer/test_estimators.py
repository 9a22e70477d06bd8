"""What every field of an online run does to targets and losses, on experience small enough to compute by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_trainer.config import Cost, PolicyTraining
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.batching import engine_options
from rlhf_trainer.loops.estimators import Prices, Targets, estimate, kl_loss_coefficient
from rlhf_trainer.loops.objective import SUMS, Objective, Slice, loss_weights
from rlhf_trainer.loops.rollout import Experience
from tests.trainer.ppo_world import experience_of

# Two prompts, two samples of each; the third reply was cut by the limit of four tokens.
RESPONSES = [[5, 1], [5, 6, 1], [5, 6, 7, 8], [1]]
SCORES = [1.0, 3.0, 2.0, 2.0]
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).float()
PLAIN: dict[str, Any] = {"whiten_advantages": False, "gae_lambda": 1.0}


def training_of(algorithm: str = "PPO", **changes: Any) -> PolicyTraining:
    fields = {
        "algorithm": algorithm,
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "generation": {"max_new_tokens": 4},
        "ppo": PLAIN,
        "missing_eos_penalty": 0.0,
    }
    return PolicyTraining.model_validate({**fields, **changes})


def experience(**given: Any) -> Experience:
    """Log-ratio to the reference ½ on every response token."""
    fields = {"logprobs": -1.0 * MASK, "sampled": -1.0 * MASK, "reference": -1.5 * MASK}
    scores = given.pop("scores", SCORES)
    return experience_of(RESPONSES, scores, finished=torch.tensor([True, True, False, True]), **{**fields, **given})


def targets(training: PolicyTraining, kl: float = 0.0, costs: dict[Cost, float] | None = None, **given: Any) -> Targets:
    return estimate(experience(**given), training, Prices(kl, costs or {}))


def column(values: list[float]) -> Tensor:
    """The same number on every token of a row."""
    return torch.tensor(values)[:, None] * MASK


def test_ppo_without_discount_credits_every_token_with_what_follows() -> None:
    found = targets(training_of(), kl=0.2)
    torch.testing.assert_close(found.advantages[0, :2], torch.tensor([1 - 0.2, 1 - 0.1]))
    torch.testing.assert_close(found.returns, found.advantages)  # the critic said 0
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_gamma_and_lambda_discount() -> None:
    discounted = targets(training_of(ppo={**PLAIN, "gamma": 0.5})).advantages
    assert discounted[2].tolist() == [0.25, 0.5, 1.0, 2.0]
    values = {"values": 4.0 * MASK}
    short = targets(training_of(ppo={**PLAIN, "gae_lambda": 0.0}), **values).advantages
    assert short[2].tolist() == [0, 0, 0, -2.0]
    assert targets(training_of(), **values).advantages[2].tolist() == [-2.0] * 4


@pytest.mark.parametrize("algorithm", ["PPO", "ReinforcePlusPlus"])
def test_advantages_are_whitened_over_all_tokens_unless_told_not_to(algorithm: str) -> None:
    white = targets(training_of(algorithm, ppo={"gae_lambda": 1.0})).advantages[MASK.bool()]
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(targets(training_of(algorithm)).advantages, column(SCORES))


def test_reinforce_takes_no_notice_of_a_critic() -> None:
    training = training_of("ReinforcePlusPlus", ppo={**PLAIN, "gamma": 0.5})
    found = targets(training, values=7.0 * MASK)
    assert found.advantages[2].tolist() == [0.25, 0.5, 1.0, 2.0]
    assert not found.returns.any()


def test_group_algorithms_compare_whole_replies_of_a_prompt() -> None:
    torch.testing.assert_close(targets(training_of("RLOO")).advantages, column([-2, 2, 0, 0]))
    scaled = {"group": math.sqrt(2), "batch": math.sqrt(2 / 3), "none": 1.0}
    for scale, deviation in scaled.items():
        found = targets(training_of("GRPO", grpo={"scale": scale})).advantages
        torch.testing.assert_close(found, column([-1 / deviation, 1 / deviation, 0, 0]), atol=1e-3, rtol=0)


def test_the_kl_of_a_whole_reply_is_taken_off_its_reward() -> None:
    found = targets(training_of("RLOO"), kl=2.0).advantages
    torch.testing.assert_close(found, column([(1 - 2) - (3 - 3), (3 - 3) - (1 - 2), -3, 3]))


def test_with_the_kl_in_the_loss_none_is_in_the_reward() -> None:
    loss = {"placement": "loss", "estimator": "k3"}
    for algorithm in ("PPO", "GRPO", "RLOO", "ReinforcePlusPlus", "BestOfN"):
        training = training_of(algorithm, kl=loss)
        torch.testing.assert_close(targets(training, kl=2.0).advantages, targets(training, kl=0.0).advantages)
        assert kl_loss_coefficient(training, Prices(2.0)) == 2.0
        assert kl_loss_coefficient(training_of(algorithm), Prices(2.0)) == 0.0


def test_best_of_n_learns_from_the_best_sample_of_each_prompt() -> None:
    assert targets(training_of("BestOfN")).rows.tolist() == [1, 2]
    # The KL in the reward decides too: four tokens at ½ nat cost more than one.
    assert targets(training_of("BestOfN"), kl=0.1).rows.tolist() == [1, 3]


def test_whitened_rewards_have_deviation_one_and_their_mean() -> None:
    outcomes = targets(training_of(ppo={**PLAIN, "whiten_rewards": True})).outcomes
    assert outcomes.tolist() == pytest.approx([2 - math.sqrt(2), 2 + math.sqrt(2), 2, 2], rel=1e-5)


def test_cut_and_overlong_replies_are_penalised() -> None:
    assert targets(training_of(missing_eos_penalty=0.5)).outcomes.tolist() == [1, 3, 1.5, 2]
    overlong = {"start": 2, "penalty": 3.0}
    assert targets(training_of(overlong=overlong)).outcomes.tolist() == [1, 1.5, -1, 2]


def test_an_overlong_penalty_that_can_never_apply_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"overlong\.start 4 is not below generation\.maxNewTokens 4"):
        training_of(overlong={"start": 4})


def test_costs_are_priced_and_the_lagrangian_is_divided() -> None:
    costs = {Cost.LENGTH: 0.5, Cost.INCOMPLETE: 0.5}
    found = targets(training_of("RLOO"), kl=0.0, costs=costs)
    assert found.outcomes.tolist() == [0.0, 0.75, -0.25, 0.75]
    # The KL belongs to the objective and is divided with it.
    half = targets(training_of(), kl=1.0, costs=costs)
    assert half.advantages[3, 0].item() == pytest.approx((2 - 0.5 - 0.5) / 2)


def test_the_kl_term_of_the_loss_is_divided_where_advantages_keep_the_scale() -> None:
    prices, loss = Prices(1.0, {Cost.LENGTH: 1.0}), {"placement": "loss", "estimator": "k2"}
    assert kl_loss_coefficient(training_of("RLOO", kl=loss), prices) == 0.5
    assert kl_loss_coefficient(training_of("PPO", kl=loss), prices) == 0.5
    assert kl_loss_coefficient(training_of("PPO", kl=loss, ppo={}), prices) == 1.0
    assert kl_loss_coefficient(training_of("GRPO", kl=loss), prices) == 1.0
    assert kl_loss_coefficient(training_of("GRPO", kl=loss, grpo={"scale": "none"}), prices) == 0.5


def test_another_sampler_is_corrected_for_and_the_local_one_is_not() -> None:
    foreign = {"sampled": (-1.0 + math.log(0.5)) * MASK}
    remote = training_of(generation={"max_new_tokens": 4, "engine": "vllm"})
    torch.testing.assert_close(targets(remote, **foreign).corrections, 1 + MASK)
    assert bool((targets(training_of(), **foreign).corrections == 1).all())


def losses(training: PolicyTraining, shift: float = 0.3, kl: float = 0.0, **options: Any) -> dict[str, float]:
    """The loss of the whole batch as one mini batch after every log-prob has moved by ``shift``; "gradient" is that in
    the log-probs, summed."""
    given = options.pop("given", {})
    sample = experience(**given)
    found = estimate(sample, training, Prices(kl))
    rows = found.rows.tolist()
    weights = loss_weights(sample.lengths[rows], 4, training)
    part = Slice.of(sample, found, weights, rows, 4, torch.device("cpu"))
    logprobs = ((sample.logprobs + shift * MASK)[rows]).requires_grad_()
    values = torch.full((len(rows), 4), options.pop("value", 0.0)).requires_grad_()
    result = Objective(training, kl_loss_coefficient(training, Prices(kl)), **options)(logprobs, values, part)
    result.total.backward()
    assert logprobs.grad is not None
    figures = dict(zip(SUMS, result.sums.tolist(), strict=True))
    return figures | {"total": float(result.total.detach()), "gradient": float(logprobs.grad.sum())}


def test_the_clip_fields_reach_the_surrogate() -> None:
    """All advantages are positive and the ratio is 1.35, so it is the upper bound that cuts."""
    ratio = math.exp(0.3)
    mean = float((column(SCORES)).sum() / 10)
    assert losses(training_of())["policyLoss"] == pytest.approx(-1.2 * mean)
    assert losses(training_of())["clipFraction"] == 10
    wide = training_of(ppo={**PLAIN, "clip": 0.2, "clip_high": 0.5})
    assert losses(wide)["policyLoss"] == pytest.approx(-ratio * mean)
    assert losses(wide, shift=-0.3)["clipFraction"] == 0
    negative = {"given": {"scores": [-1.0, -3.0, -2.0, -2.0]}}
    dual = training_of(ppo={**PLAIN, "dual_clip": 1.1})
    assert losses(dual, **negative)["policyLoss"] == pytest.approx(1.1 * mean)
    assert losses(training_of(), **negative)["policyLoss"] == pytest.approx(ratio * mean)


def test_an_unmoved_policy_has_no_kl_and_nothing_clipped() -> None:
    found = losses(training_of(), shift=0.0)
    assert (found["clipFraction"], found["approxKl"], found["tokens"]) == (0, 0, 10)
    assert losses(training_of())["approxKl"] == pytest.approx(10 * (math.exp(0.3) - 1 - 0.3), rel=1e-4)


def test_value_clip_and_coefficient() -> None:
    training = training_of(ppo={**PLAIN, "value_clip": 0.5, "value_coefficient": 0.25})
    found = losses(training, value=1.0)
    squares = float((MASK * (column(SCORES) - 0.5).square()).sum())  # 1 was clipped to 0.5, further from every return
    assert found["valueLoss"] == pytest.approx(0.5 * squares / 10)
    assert found["total"] == pytest.approx(found["policyLoss"] + 0.25 * found["valueLoss"])
    assert losses(training_of("RLOO"), value=1.0)["valueLoss"] == 0


def test_warming_up_trains_values_alone() -> None:
    found = losses(training_of(), warming=True)
    assert found["gradient"] == 0
    assert found["total"] == pytest.approx(0.1 * found["valueLoss"])


def test_loss_normalisations_weigh_long_replies_differently() -> None:
    flat = {"given": {"scores": [1.0] * 4}}
    found = {
        mode: losses(training_of(loss_normalization=mode), shift=0.0, **flat)["policyLoss"]
        for mode in ("token", "sequence", "maxLength")
    }
    assert found == pytest.approx({"token": -1.0, "sequence": -1.0, "maxLength": -10 / 16})
    uneven = {mode: losses(training_of(loss_normalization=mode), shift=0.0)["policyLoss"] for mode in found}
    assert uneven["token"] == pytest.approx(-(2 * 1 + 3 * 3 + 4 * 2 + 2) / 10)
    assert uneven["sequence"] == pytest.approx(-(1 + 3 + 2 + 2) / 4)


@pytest.mark.parametrize(("estimator", "term"), [("k2", 0.5 * 0.8**2), ("k3", math.exp(-0.8) - 1 + 0.8)])
def test_the_estimator_of_the_loss_is_the_one_asked_for(estimator: str, term: float) -> None:
    """The log-ratio to the reference is 0.8 after the shift; the weight of the older sample is exp(0.3)."""
    training = training_of(kl={"placement": "loss", "estimator": estimator})
    found = losses(training, kl=0.5)
    assert found["klLoss"] == pytest.approx(math.exp(0.3) * term)
    assert found["total"] == pytest.approx(found["policyLoss"] + 0.5 * found["klLoss"] + 0.1 * found["valueLoss"])
    # Both have the gradient of the KL: ratio times log-ratio.
    alone = found["gradient"] - losses(training, kl=0.0)["gradient"]
    assert alone == pytest.approx(0.5 * math.exp(0.3) * 0.8)


def test_best_of_n_is_the_cross_entropy_of_the_chosen_rows() -> None:
    found = losses(training_of("BestOfN"), shift=0.0)
    assert (found["policyLoss"], found["tokens"], found["clipFraction"]) == (1.0, 7, 0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_sampler_corrections_weigh_policy_and_kl_and_not_the_values(estimator: str) -> None:
    loss = {"placement": "loss", "estimator": estimator}
    remote = training_of(kl=loss, generation={"max_new_tokens": 4, "engine": "vllm"})
    foreign = {"given": {"sampled": (-1.0 + math.log(0.8)) * MASK}}
    plain, weighed = losses(training_of(kl=loss), kl=0.5), losses(remote, kl=0.5, **foreign)
    for name in ("policyLoss", "klLoss", "gradient"):
        assert weighed[name] == pytest.approx(1.25 * plain[name])
        assert abs(plain[name]) > 0.1
    assert weighed["valueLoss"] == pytest.approx(plain["valueLoss"])


def test_batch_arithmetic() -> None:
    training = training_of("GRPO", prompts_per_step=8, ppo={"mini_batches": 2})
    options = engine_options(training, world_size=2)
    assert (options.rows_per_step, options.micro_rows) == (8, 4)
    best = training_of("BestOfN", prompts_per_step=8, ppo={"mini_batches": 2}, micro_batch_size=1)
    assert (engine_options(best, 2).rows_per_step, engine_options(best, 2).micro_rows) == (4, 1)
    long = training_of("GRPO", prompts_per_step=8, ppo={"mini_batches": 2}, max_prompt_length=10_000)
    assert engine_options(long, 2).micro_rows == 2  # four rows would be 40,016 tokens


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    training = training_of("GRPO", prompts_per_step=12, ppo={"mini_batches": 1}, micro_batch_size=5)
    with pytest.raises(Invalid, match=r"microBatchSize is 5, .* the 12 rows .* choose 4 or 6"):
        engine_options(training, world_size=2)


def test_the_gap_of_a_step_weighs_tokens_alike_whoever_sampled_them() -> None:
    """One rank has a reply of one token, off by 0.2 nats, the other one of nine, off by nothing: 0.02 a token."""
    off, right = torch.full((1, 1), -1.2), torch.full((1, 9), -1.0)
    parts = [
        experience_of([[1]], [0.0], sampled=off, logprobs=off + 0.2, sampler_gap=0.2),
        experience_of([[5] * 8 + [1]], [0.0], sampled=right, logprobs=right),
    ]
    assert Experience.join(parts).sampler_gap == pytest.approx(0.02)
