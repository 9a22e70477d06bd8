"""Reward models against known answers: Bradley-Terry recovery, temperature, calibration error, and the gate."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_trainer.config import HumanScores, RewardModelValidation
from rlhf_trainer.distributed import World, join
from rlhf_trainer.evals.calibration import (
    HeldOut,
    brier_score,
    calibration_error,
    cross_fitted_probabilities,
    temperature,
)
from rlhf_trainer.evals.reward_model import (
    Evidence,
    HumanScored,
    accuracy_verdict,
    calibration_verdict,
    correlation_verdicts,
    judge,
)
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.reward_model import learning_rate, member_rows
from rlhf_trainer.models.reward import RewardEnsemble, load_reward_model
from rlhf_trainer.wire import VerdictState
from tests.trainer.closed_forms import recovery
from tests.trainer.training_world import TinyWorld, training_of

PAIRS = 4000


def synthetic(seed: int, scale: float = 1.0, count: int = PAIRS, per_prompt: int = 1) -> HeldOut:
    """Pairs whose labels follow sigmoid(delta / scale): a model that is over-confident by the factor ``scale``."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(0.0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-delta))).astype(float)
    return HeldOut(delta * scale, labels, tuple(f"prompt {index // per_prompt}" for index in range(count)))


def test_brier_of_known_predictions() -> None:
    prompts = ("one", "two")
    assert brier_score(np.array([0.5, 0.5]), np.array([1.0, 0.0]), prompts).estimate == pytest.approx(0.25)
    interval = brier_score(np.array([0.9, 0.2]), np.array([1.0, 0.0]), prompts)
    assert interval.estimate == pytest.approx((0.01 + 0.04) / 2)
    assert 0 <= interval.lower < interval.estimate < interval.upper <= 1


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0, 20.0])
def test_a_known_temperature_is_recovered(scale: float) -> None:
    pairs = synthetic(1, scale)
    assert temperature(pairs) == pytest.approx(scale, rel=0.1)


def test_calibration_error_of_a_known_gap() -> None:
    predicted = np.full(1000, 0.8)
    observed = np.concatenate([np.ones(500), np.zeros(500)])
    np.random.default_rng(0).shuffle(observed)
    assert calibration_error(predicted, observed) == pytest.approx(0.3, abs=1e-12)
    perfect = np.random.default_rng(1).random(100_000)
    labels = (np.random.default_rng(2).random(100_000) < perfect).astype(float)
    assert calibration_error(perfect, labels) < 0.01


def test_temperature_repairs_overconfidence_and_the_gate_sees_both() -> None:
    overconfident = synthetic(3, scale=4.0)
    before = calibration_verdict(overconfident, 0.10, calibrate=False, seed=0)
    after = calibration_verdict(overconfident, 0.10, calibrate=True, seed=0)
    assert before.state is VerdictState.FAIL
    assert after.state is VerdictState.PASS
    assert after.estimate is not None
    assert after.estimate < 0.03


def test_the_calibration_interval_covers_a_calibrated_model() -> None:
    """Of 40 well-calibrated models with 400 pairs, nearly all must pass a limit of 0.1 that their noise comes near to;
    of 40 that are off by 0.2, none may."""
    good = [calibration_verdict(synthetic(seed, count=400), 0.10, False, 0).state for seed in range(40)]
    bad = [calibration_verdict(synthetic(seed, 8.0, 400), 0.10, False, 0).state for seed in range(40)]
    assert good.count(VerdictState.PASS) >= 36
    assert bad.count(VerdictState.PASS) == 0


def test_no_prompt_judges_a_temperature_it_helped_to_fit() -> None:
    pairs = synthetic(4, scale=2.0, count=400, per_prompt=4)
    predicted = cross_fitted_probabilities(pairs, calibrate=True, seed=0)
    implied = pairs.delta / np.log(predicted / (1 - predicted))
    by_prompt = {prompt: round(float(value), 6) for prompt, value in zip(pairs.prompts, implied, strict=True)}
    assert len(set(by_prompt.values())) == 2, "two halves, a temperature each"
    assert all(by_prompt[p] == round(float(v), 6) for p, v in zip(pairs.prompts, implied, strict=True))


def test_verdicts_are_decided_on_bounds() -> None:
    good, coin = synthetic(5), synthetic(6)
    coin = HeldOut(coin.delta, np.random.default_rng(0).permutation(coin.probability_a), coin.prompts)
    assert accuracy_verdict("accuracy", good, 0.65).state is VerdictState.PASS
    assert accuracy_verdict("accuracy", coin, 0.65).state is VerdictState.FAIL
    few = good.take(np.arange(60))
    undecided = accuracy_verdict("accuracy", few, 0.70)
    assert undecided.state is VerdictState.NEED_MORE_DATA
    assert undecided.needed
    assert accuracy_verdict("accuracy", good.take(np.arange(5)), 0.65).needed == 25


def test_scores_that_are_all_equal_are_right_by_half() -> None:
    equal = HeldOut(np.zeros(100), np.zeros(100), tuple(map(str, range(100))))
    verdict = accuracy_verdict("accuracy", equal, 0.65)
    assert (verdict.estimate, verdict.state) == (0.5, VerdictState.FAIL)


def test_clustering_by_prompt_widens_the_interval() -> None:
    pairs = synthetic(7, count=1000)
    correct = (pairs.delta > 0) == (pairs.probability_a > 0.5)
    order = np.argsort(correct, kind="stable")  # answers to one prompt are all right or all wrong
    clustered = HeldOut(pairs.delta[order], pairs.probability_a[order], tuple(f"p{i // 50}" for i in range(1000)))
    alone, together = accuracy_verdict("accuracy", pairs, 0.5), accuracy_verdict("accuracy", clustered, 0.5)
    assert alone.estimate == together.estimate
    assert together.lower is not None
    assert alone.lower is not None
    assert together.lower < alone.lower - 0.05


def human(rewards: np.ndarray, scores: np.ndarray) -> HumanScored:
    count = len(scores)
    return HumanScored(rewards.tolist(), scores.tolist(), [5.0] * count, tuple(map(str, range(count))))


def test_correlation_and_the_whole_gate() -> None:
    truth = np.random.default_rng(8).normal(size=300)
    rewards = truth + np.random.default_rng(9).normal(0, 0.5, 300)
    for sign, state in ((1, VerdictState.PASS), (-1, VerdictState.FAIL)):
        spearman, pearson = correlation_verdicts(human(sign * rewards, truth), 0.6, 0)
        assert (spearman.metric, spearman.state) == ("humanCorrelation", state)
        assert (pearson.metric, pearson.state) == ("humanPearson", state)
    scores = HumanScores(uri="pvc://c/p", digest="sha256:" + "0" * 64)
    gate = judge(Evidence(synthetic(1)), RewardModelValidation(human_scores=scores), True, 0)
    assert [v.metric for v in gate] == ["accuracy", "calibrationError", "humanCorrelation", "humanPearson"]
    assert [v.state for v in gate[2:]] == [VerdictState.NEED_MORE_DATA] * 2, "no evidence is not a pass"
    assert len(judge(Evidence(synthetic(1)), RewardModelValidation(), True, 0)) == 2


def test_an_outlier_that_ranks_do_not_see_is_seen_by_pearson() -> None:
    truth = np.random.default_rng(8).normal(size=300)
    hacked = truth.copy()
    hacked[:3] = 300.0  # three replies that found a hole in the reward
    spearman, pearson = correlation_verdicts(human(hacked, truth), 0.6, 0)
    assert spearman.state is VerdictState.PASS
    assert pearson.state is VerdictState.FAIL or pearson.state is VerdictState.NEED_MORE_DATA
    assert pearson.estimate is not None
    assert pearson.estimate < 0.3


def test_each_member_has_its_own_rows_and_every_step_the_same_again() -> None:
    training = training_of(epochs=2, global_batch_size=10, ensemble={"members": 3})
    first = [member_rows(training, 100, member, 4).tolist() for member in range(3)]
    assert first == [member_rows(training, 100, member, 4).tolist() for member in range(3)]
    assert len({tuple(rows) for rows in first}) == 3
    epoch = np.concatenate([member_rows(training, 100, 0, step) for step in range(10)])
    assert 50 < len(set(epoch.tolist())) < 75, "a bootstrap sample holds about 63 % of the rows"
    single = training_of(global_batch_size=10, ensemble={"members": 1})
    whole = np.concatenate([member_rows(single, 100, 0, step) for step in range(10)])
    assert sorted(whole.tolist()) == list(range(100))


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(1.0, step, 100) for step in range(100)]
    assert rates.index(max(rates)) in range(3, 6)
    assert rates[0] < 0.25
    assert rates[-1] == pytest.approx(0.01)
    assert learning_rate(1.0, 0, 1) == 1.0


@pytest.fixture(scope="module")
def world() -> World:
    return join(timedelta(seconds=60))


def test_bradley_terry_recovery_reaches_the_noise_ceiling(tiny_world: TinyWorld, world: World) -> None:
    """Labels are drawn from a known reward, so nobody can score above mean max(p, 1-p) but by luck."""
    reached, ceiling = recovery(tiny_world.base, world, 60, shuffled=False)
    noise = 2 * math.sqrt(ceiling * (1 - ceiling) / 480)
    assert ceiling - 2 * noise <= reached <= ceiling + noise
    control, _ = recovery(tiny_world.base, world, 15, shuffled=True)
    assert abs(control - 0.5) < 0.1, "without a signal there is nothing to learn"


def test_heads_start_small_and_members_apart(tiny_world: TinyWorld) -> None:
    ensemble = RewardEnsemble.from_base(tiny_world.base, 3, 0, seed=0)
    heads = [member.model.score.weight for member in ensemble.members]
    assert not torch.equal(heads[0], heads[1])
    assert 0.5 < float(torch.cat(heads).detach().std()) * math.sqrt(16 + 1) < 1.5
    again = RewardEnsemble.from_base(tiny_world.base, 3, 0, seed=0)
    assert torch.equal(heads[2], again.members[2].model.score.weight)
    assert all(module.p == 0 for module in ensemble.modules() if isinstance(module, nn.Dropout))


def test_the_scored_token_is_found_by_length(tiny_world: TinyWorld) -> None:
    """A pad id inside the text (pad is an ordinary id there) or behind it must not move the scored position."""
    member = RewardEnsemble.from_base(tiny_world.base, 1, 0, seed=0).members[0]
    row = [1, 9, 0, 12, 2]
    with torch.no_grad():
        alone = member(torch.tensor([row]), torch.tensor([5]))
        padded = member(torch.tensor([[*row, 0, 0, 0]]), torch.tensor([5]))
        shorter = member(torch.tensor([row]), torch.tensor([4]))
    assert float(alone) == pytest.approx(float(padded), abs=1e-6)
    assert float(alone) != pytest.approx(float(shorter), abs=1e-6)


def test_a_folder_that_is_no_reward_model_is_refused(tiny_world: TinyWorld) -> None:
    with pytest.raises(Invalid, match="calibration"):
        load_reward_model(tiny_world.base)
