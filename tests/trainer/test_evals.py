"""Intervals that cover what they promise, judges whose bias cancels, verdicts decided on bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlhf_trainer.evals.stats import (
    Interval,
    clopper_pearson,
    clustered_mean,
    clustered_student,
    needed_for_margin,
    spearman,
    student_mean,
    wilson,
)
from rlhf_trainer.evals.verdicts import at_least, rate_at_most
from rlhf_trainer.evals.win_rate import length_controlled_win_rate, outcomes, win_rate
from rlhf_trainer.wire import VerdictState


def test_wilson_and_clopper_pearson_agree_with_scipy() -> None:
    for hits, n in [(0, 20), (3, 20), (20, 20), (140, 200)]:
        for ours, method in ((wilson(hits, n), "wilson"), (clopper_pearson(hits, n), "exact")):
            theirs = scipy_stats.binomtest(hits, n).proportion_ci(method=method)
            assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def simulate(rng: np.random.Generator, p: float, prompts: int, per_prompt: int) -> tuple[list[float], list[int]]:
    """Replies to one prompt share a Beta-distributed chance of winning: strongly dependent within the prompt."""
    chances = rng.beta(2 * p, 2 * (1 - p), prompts)
    wins = rng.random((prompts, per_prompt)) < chances[:, None]
    return [float(x) for x in wins.ravel()], [i for i in range(prompts) for _ in range(per_prompt)]


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9])
def test_clustered_win_rates_cover_the_truth(p: float) -> None:
    """95 % promised; of 800 simulated judges with known p, 93 to 97 % give or take the simulation's own noise."""
    rng = np.random.default_rng(int(p * 100))
    covered = 0
    for _ in range(800):
        interval = clustered_mean(*simulate(rng, p, prompts=80, per_prompt=4))
        covered += interval.lower <= p <= interval.upper
    assert 0.93 <= covered / 800 <= 0.975


def test_ignoring_the_clusters_would_cover_too_little() -> None:
    """Negative control: the same data taken as independent."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        values, _ = simulate(rng, 0.7, prompts=80, per_prompt=4)
        interval = wilson(sum(values), len(values))
        covered += interval.lower <= 0.7 <= interval.upper
    assert covered / 400 < 0.90


def test_a_mean_of_equal_values_still_has_width() -> None:
    interval = clustered_mean([1.0] * 50, range(50))
    assert interval.estimate == 1.0
    assert 0.9 < interval.lower < 0.95


def test_one_cluster_says_nothing() -> None:
    assert clustered_mean([1.0, 0.0], ["same", "same"]).lower == 0.0


@pytest.mark.parametrize("large", [60, 100, 1000])
def test_one_prompt_with_most_of_the_answers_does_not_decide(large: int) -> None:
    """Its residuals are near 0 whatever it says: counted as one prompt of 31, the bound passed the truth in half of all
    draws."""
    rng, prompts = np.random.default_rng(large), [0] * large + list(range(1, 31))
    above = 0
    for _ in range(300):
        chance = rng.beta(1.5, 0.8, size=31)
        right = (rng.random(len(prompts)) < chance[prompts]).astype(float)
        above += clustered_mean(right.tolist(), prompts).lower > 1.5 / 2.3
    assert above <= 0.06 * 300


def test_spearman_covers_the_truth() -> None:
    """For a bivariate normal, Spearman's rho is 6/pi asin(r/2)."""
    rng, r = np.random.default_rng(3), 0.7
    truth = 6 / np.pi * np.arcsin(r / 2)
    covered = 0
    for _ in range(500):
        x = rng.standard_normal(100)
        y = r * x + np.sqrt(1 - r * r) * rng.standard_normal(100)
        interval = spearman(list(x), list(y))
        covered += interval.lower <= truth <= interval.upper
    assert 0.925 <= covered / 500 <= 0.98


def test_spearman_of_several_responses_to_a_prompt_covers_the_truth() -> None:
    """20 responses to each of 20 prompts; rewards and scores differ mostly from prompt to prompt."""
    rng, prompts, covered, ignoring = np.random.default_rng(8), [at for at in range(20) for _ in range(20)], 0, 0
    r = 0.75 / math.sqrt((1.0 + 0.25) * (0.75**2 + 0.8**2 + 0.25))
    truth = 6 / math.pi * math.asin(r / 2)
    for _ in range(400):
        score, other = rng.standard_normal(20), 0.8 * rng.standard_normal(20)
        scores = np.repeat(score, 20) + 0.5 * rng.standard_normal(400)
        rewards = np.repeat(0.75 * score + other, 20) + 0.5 * rng.standard_normal(400)
        interval, narrow = spearman(rewards, scores, clusters=prompts), spearman(rewards, scores)
        covered += interval.lower <= truth <= interval.upper
        ignoring += narrow.lower <= truth <= narrow.upper
    assert 0.92 <= covered / 400 <= 0.98
    assert ignoring / 400 < 0.6  # negative control


def test_spearman_of_a_constant_reward_is_no_evidence() -> None:
    for reward in ([1.0] * 20, [float("nan"), *range(19)]):
        interval = spearman(reward, list(range(20)))
        assert (interval.estimate, interval.lower, interval.upper) == (0.0, -1.0, 1.0)


def test_spearman_with_ties_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        x, y = rng.integers(0, 6, 30).tolist(), rng.integers(0, 9, 30).tolist()
        assert spearman(x, y).estimate == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-12)


class FirstPlaceJudge:
    """Prefers the longer reply, but half of the time just whatever comes first."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        biased = self._rng.random(len(prompts)) < 0.5
        return [1.0 if b else float(len(x) > len(y)) for b, x, y in zip(biased, first, second, strict=True)]


def test_swapping_the_order_cancels_a_bias_to_the_first_place() -> None:
    count = 4000
    prompts = [str(i) for i in range(count)]
    equal = ["same"] * count
    one_order = FirstPlaceJudge()(prompts, equal, equal)
    assert np.mean(one_order) == pytest.approx(0.5, abs=0.03)
    longer = ["longer reply" if i % 2 else "short" for i in range(count)]
    other = ["short" if i % 2 else "longer reply" for i in range(count)]
    naive = np.mean(FirstPlaceJudge()(prompts, longer, other))
    swapped = np.mean(outcomes(FirstPlaceJudge(), prompts, longer, other))
    assert naive > 0.70  # truth is ½
    assert swapped == pytest.approx(0.5, abs=0.03)


def test_a_win_bought_by_length_is_none_at_equal_length() -> None:
    """Results that hang on length alone are a coin at equal length; an honest lead survives the control."""
    rng = np.random.default_rng(5)
    ours, theirs = rng.integers(10, 30, 3000), rng.integers(5, 20, 3000)
    longer = np.tanh((ours - theirs) / np.sqrt(np.mean((ours - theirs) ** 2)))
    for lead in (0.0, 1.0):
        chance = 1 / (1 + np.exp(-(lead + 2.0 * longer)))
        results = (rng.random(3000) < chance).astype(float).tolist()
        names = [str(index) for index in range(3000)]
        controlled = length_controlled_win_rate(results, ours.tolist(), theirs.tolist(), names).estimate
        assert controlled == pytest.approx(1 / (1 + np.exp(-lead)), abs=0.06)
        assert np.mean(results) > controlled + 0.07, "the raw rate counts the length"
    rest = ([5.0] * 4, [5.0] * 4, list("abcd"))
    assert length_controlled_win_rate([1.0, 0.0, 1.0, 1.0], *rest) == win_rate([1.0, 0.0, 1.0, 1.0], list("abcd"))
    won = length_controlled_win_rate([1.0] * 20, list(range(20)), [3.0] * 20, [str(at) for at in range(20)])
    assert 0.5 < won.lower < won.estimate < won.upper <= 1.0, "equal results still have width"


def asked_twice(rng: np.random.Generator, prompts: int) -> tuple[list[float], list[float], list[float], list[str]]:
    """Both replies to a prompt share its taste; they are longer than the other's by half a deviation."""
    longer = rng.normal(4.0, 8.0, 2 * prompts)
    x = np.tanh(longer / np.sqrt(80.0))
    taste = np.repeat(rng.choice([-0.5, 0.5], prompts), 2)
    results = (rng.random(2 * prompts) < 1 / (1 + np.exp(-(0.3 + taste + 1.5 * x)))).astype(float)
    return results.tolist(), longer.tolist(), [0.0] * (2 * prompts), [str(at // 2) for at in range(2 * prompts)]


def test_the_interval_at_equal_length_covers_what_many_more_samples_find_and_the_plain_one_does_not() -> None:
    rng = np.random.default_rng(6)
    truth = length_controlled_win_rate(*asked_twice(rng, 100_000)).estimate
    assert truth == pytest.approx(0.57, abs=0.01)
    covered, plainly = 0, 0
    for _ in range(400):
        sample = asked_twice(rng, 150)
        controlled, plain = length_controlled_win_rate(*sample), win_rate(sample[0], sample[3])
        covered += controlled.lower <= truth <= controlled.upper
        plainly += plain.lower <= truth <= plain.upper
    assert 0.925 <= covered / 400 <= 0.98
    assert plainly / 400 < 0.3


def test_unbounded_means_cover_the_truth_by_cluster_and_not_by_value() -> None:
    """KL of replies to prompts that are asked four times, some prompts further off than others."""
    rng = np.random.default_rng(8)
    covered, naive = 0, 0
    for _ in range(600):
        values = (1.0 + np.repeat(rng.exponential(2.0, 60) - 2.0, 4) + rng.normal(0.0, 1.0, 240)).tolist()
        interval = clustered_student(values, [at // 4 for at in range(240)])
        covered += interval.lower <= 1.0 <= interval.upper
        plain = student_mean(values)
        naive += plain.lower <= 1.0 <= plain.upper
    assert 0.92 <= covered / 600 <= 0.975
    assert naive / 600 < 0.80
    assert clustered_student([1.0, 2.0], ["same", "same"]).upper == math.inf


def test_ties_count_half() -> None:
    def judge(_prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [0.5 if x == y else float(x > y) for x, y in zip(first, second, strict=True)]

    results = outcomes(judge, ["p", "q", "r"], ["b", "a", "a"], ["a", "a", "b"])
    assert results == [1.0, 0.5, 0.0]
    assert win_rate(results, ["p", "q", "r"]).estimate == 0.5


def test_a_verdict_hangs_on_the_bounds_and_not_on_the_estimate() -> None:
    states = {
        VerdictState.PASS: wilson(320, 400),
        VerdictState.NEED_MORE_DATA: wilson(30, 40),
        VerdictState.FAIL: wilson(200, 400),
    }
    for state, interval in states.items():
        assert at_least("winRate", interval, 0.7, "").state is state


def test_need_more_data_says_how_many_and_that_many_decide() -> None:
    few = wilson(60, 80)
    verdict = at_least("winRate", few, 0.7, "")
    assert verdict.needed is not None
    assert str(verdict.needed) in verdict.message
    n = 80 + verdict.needed
    assert at_least("winRate", wilson(0.75 * n * 1.01, n * 1.01), 0.7, "").state is VerdictState.PASS


def test_an_estimate_on_the_threshold_never_decides() -> None:
    assert needed_for_margin(Interval(100, 0.7, 0.6, 0.8), 0.7) is None


def test_no_violations_in_few_replies_prove_little() -> None:
    verdict = rate_at_most("violationRate", 0, 400, 0.001, "")
    assert verdict.state is VerdictState.NEED_MORE_DATA
    assert verdict.needed is not None
    assert rate_at_most("violationRate", 0, 400 + verdict.needed, 0.001, "").state is VerdictState.PASS
    assert rate_at_most("violationRate", 0, 400, 0.05, "").state is VerdictState.PASS
    assert rate_at_most("violationRate", 60, 400, 0.05, "").state is VerdictState.FAIL


def test_a_limit_of_zero_is_never_shown_and_says_so() -> None:
    verdict = rate_at_most("violationRate", 0, 400, 0.0, "")
    assert (verdict.state, verdict.needed) == (VerdictState.NEED_MORE_DATA, None)
    assert rate_at_most("violationRate", 1, 400, 0.0, "").state is VerdictState.FAIL


def test_a_rate_at_its_limit_says_that_no_number_would_do() -> None:
    assert rate_at_most("violationRate", 21, 400, 0.05, "").needed is None
