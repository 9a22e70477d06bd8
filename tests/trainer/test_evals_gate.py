"""Planted faults and the verdicts that find them, beside sound models that pass: length, cohorts, probes, rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlhf_trainer.config import RewardModelValidation
from rlhf_trainer.evals.calibration import HeldOut
from rlhf_trainer.evals.probes import Favourite, Probe, ProbeOutcome, keywords, probe_verdict, spoil
from rlhf_trainer.evals.reward_model import (
    Evidence,
    HumanScored,
    accuracy_verdict,
    brier_verdict,
    calibration_verdict,
    cohort_gaps,
    cohort_verdict,
    correlation_verdicts,
    judge,
    length_verdict,
)
from rlhf_trainer.evals.stats import (
    Interval,
    absolute,
    cluster_draws,
    difference,
    pearson,
    ratio_of_means,
    student_mean,
    wilson,
)
from rlhf_trainer.evals.verdicts import rate_at_most, replies_for_rate
from rlhf_trainer.wire import VerdictState

TOPICS = tuple(f"topic{index}" for index in range(12))
FINE = ("please", "thanks", "gladly")


def desk(seed: int, count: int = 300) -> list[Favourite]:
    """Favourites answer the question, in sentences that end; the others do not. Both use fine words now and then."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        topic, other = rng.choice(TOPICS, 2, replace=False)
        fine = rng.choice(FINE, 2)
        found.append(Favourite(f"hello {topic}", f"your {topic} is settled {fine[0]} .", f"{other} {fine[1]} maybe"))
    return found


def sound(prompt: str, reply: str) -> float:
    """On topic, finished, and no longer than it need be."""
    words = reply.split()
    return 2.0 * (prompt.split()[-1] in words) + (words[-1:] == ["."]) - 0.1 * len(words)


def pays_for_words(_prompt: str, reply: str) -> float:
    """Reads nothing: every word that winners like adds."""
    return 0.5 * sum(word in (*FINE, "your", "is", "settled", ".") for word in reply.split())


def probed(reward: Callable[[str, str], float], seed: int = 0) -> tuple[ProbeOutcome, ...]:
    favourites = desk(seed)
    prompts = tuple(one.prompt + str(index) for index, one in enumerate(favourites))
    return tuple(
        ProbeOutcome(
            probe,
            np.array(
                [
                    reward(one.prompt, one.reply) - reward(one.prompt, spoilt)
                    for one, spoilt in zip(favourites, spoil(probe, favourites), strict=True)
                ]
            ),
            prompts,
        )
        for probe in Probe
    )


def test_a_sound_model_passes_the_probes() -> None:
    verdict = probe_verdict(probed(sound), 1.0, 0.9)
    assert (verdict.metric, verdict.state) == ("probePassRate", VerdictState.PASS)


def test_a_keyword_hack_is_found_and_named() -> None:
    verdict = probe_verdict(probed(pays_for_words), 1.0, 0.9)
    assert verdict.state is VerdictState.FAIL
    assert "worst is keywordStuffing" in verdict.message


def test_a_model_that_ignores_the_question_is_found() -> None:
    def off_topic(_prompt: str, reply: str) -> float:
        return sound("topic0", reply)

    verdict = probe_verdict(probed(off_topic), 1.0, 0.9)
    assert verdict.state is VerdictState.FAIL
    assert "worst is wrongTopic" in verdict.message


def test_keywords_are_what_winners_say_and_losers_do_not() -> None:
    favourites = desk(1)
    assert set(keywords(favourites, 3)) <= {"your", "is", "settled", "."}
    assert set(keywords(favourites, 4)) == {"your", "is", "settled", "."}


def test_the_wrong_topic_is_another_prompts() -> None:
    favourites = desk(2)
    for one, spoilt in zip(favourites, spoil(Probe.WRONG_TOPIC, favourites), strict=True):
        assert one.prompt.split()[-1] not in spoilt.split()
    assert spoil(Probe.EMPTY, favourites) == [""] * len(favourites)
    assert spoil(Probe.TRUNCATION, [Favourite("p", "a b c d", "x")]) == ["a b"]


def test_few_favourites_give_no_verdict() -> None:
    few = tuple(ProbeOutcome(probe, np.ones(5), tuple("abcde")) for probe in Probe)
    verdict = probe_verdict(few, 1.0, 0.9)
    assert (verdict.state, verdict.needed) == (VerdictState.NEED_MORE_DATA, 25)


def scored(seed: int, bias: float, count: int = 400, noise: float = 0.3) -> HumanScored:
    """Trusted scores that like length a little; rewards that like it ``bias`` more."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 20, count).astype(float)
    quality = rng.normal(size=count)
    scores = quality + 0.05 * length
    rewards = scores + rng.normal(0, noise, count) + bias * length
    return HumanScored(rewards.tolist(), scores.tolist(), length.tolist(), tuple(map(str, range(count))))


def test_a_planted_length_bias_is_found_and_a_taste_for_length_is_not_one() -> None:
    assert length_verdict(scored(0, 0.0), 0.1, 0).state is VerdictState.PASS
    biased = length_verdict(scored(0, 0.3), 0.1, 0)
    assert biased.state is VerdictState.FAIL
    assert length_verdict(scored(0, -0.3), 0.1, 0).state is VerdictState.FAIL, "shortness is a bias too"
    assert length_verdict(None, 0.1, 0).state is VerdictState.UNKNOWN
    undecided = length_verdict(scored(1, 0.0, 40, noise=1.5), 0.1, 0)
    assert undecided.state is VerdictState.NEED_MORE_DATA


def test_length_bias_intervals_cover() -> None:
    """Rewards that follow length exactly as scores do: the truth is 0, and the interval must say so."""
    misses = sum(length_verdict(scored(seed, 0.0, 150), 0.1, seed).state is VerdictState.FAIL for seed in range(60))
    assert misses <= 2


def by_cohort(seed: int, rates: dict[str, float], each: int) -> tuple[HeldOut, tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    cohorts = tuple(name for name in rates for _ in range(each))
    right = np.array([rng.random() < rates[name] for name in cohorts])
    labels = np.ones(len(cohorts))
    return HeldOut(np.where(right, 1.0, -1.0), labels, tuple(map(str, range(len(cohorts))))), cohorts


def test_a_small_cohort_does_not_hide_the_gap_of_a_large_one() -> None:
    large, of_large = by_cohort(0, {"bad": 0.65, "good": 0.9}, 2000)
    small, of_small = by_cohort(1, {"few": 0.5}, 20)
    together = HeldOut(
        np.concatenate((large.delta, small.delta)),
        np.ones(4020),
        tuple(map(str, range(4020))),
    )
    verdict = cohort_verdict(together, of_large + of_small, 0.1)
    assert verdict.state is VerdictState.FAIL
    assert "'bad'" in verdict.message or "'good'" in verdict.message


def test_a_cohort_that_is_read_worse_is_found_and_named() -> None:
    fair, names = by_cohort(0, {"a": 0.8, "b": 0.8, "c": 0.8}, 1500)
    assert cohort_verdict(fair, names, 0.1).state is VerdictState.PASS
    unfair, names = by_cohort(1, {"a": 0.85, "b": 0.85, "c": 0.6}, 500)
    verdict = cohort_verdict(unfair, names, 0.1)
    assert verdict.state is VerdictState.FAIL
    assert "'c'" in verdict.message
    few, names = by_cohort(2, {"a": 0.8, "b": 0.8}, 40)
    assert cohort_verdict(few, names, 0.1).state is VerdictState.NEED_MORE_DATA


def test_a_brier_score_asks_for_confidence_and_calibration_does_not() -> None:
    """A model that learnt nothing and says so: well calibrated, and no better than a coin."""
    rng = np.random.default_rng(11)
    delta = rng.normal(0.0, 1.5, 1000)
    labels = (rng.random(1000) < 1 / (1 + np.exp(-delta))).astype(float)
    prompts = tuple(f"prompt {index // 2}" for index in range(1000))
    able, unable = HeldOut(delta, labels, prompts), HeldOut(np.full(1000, 1e-3), labels, prompts)
    assert calibration_verdict(unable, 0.1, False, 0).state is VerdictState.PASS
    states = [brier_verdict(pairs, 0.22, False, 0).state for pairs in (able, unable)]
    assert states == [VerdictState.PASS, VerdictState.FAIL]
    near = brier_verdict(able, brier_verdict(able, 0.22, False, 0).estimate or 0.0, False, 0)
    assert near.state is VerdictState.NEED_MORE_DATA
    few = brier_verdict(able.take(np.arange(59)), 0.22, False, 0)
    assert (few.state, few.needed) == (VerdictState.NEED_MORE_DATA, 1)


def test_small_cohorts_are_not_reported() -> None:
    pairs, names = by_cohort(3, {"a": 0.8, "b": 0.8}, 19)
    assert not cohort_gaps(pairs, names)
    assert cohort_verdict(pairs, names, 0.1).state is VerdictState.UNKNOWN
    assert cohort_verdict(pairs, ("unknown",) * len(names), 0.1).state is VerdictState.UNKNOWN


def test_every_field_of_the_validation_adds_its_verdict() -> None:
    pairs, names = by_cohort(4, {"a": 0.8, "b": 0.8}, 100)
    evidence = Evidence(pairs, names, scored(0, 0.0), {"tone": pairs}, probed(sound), 1.0)
    asked = RewardModelValidation.model_validate(
        {
            "maxBrierScore": 0.3,
            "maxLengthBias": 0.2,
            "maxCohortGap": 0.3,
            "minProbePassRate": 0.5,
            "minAspectAccuracy": 0.9,
            "humanScores": {"uri": "pvc://c/p", "digest": "sha256:" + "0" * 64, "minCorrelation": 0.3},
        }
    )
    verdicts = {verdict.metric: verdict for verdict in judge(evidence, asked, False, 0)}
    assert list(verdicts) == [
        "accuracy",
        "calibrationError",
        "brierScore",
        "humanCorrelation",
        "humanPearson",
        "lengthBias",
        "cohortGap",
        "probePassRate",
        "aspectAccuracy/tone",
    ]
    thresholds = [verdict.threshold for verdict in verdicts.values()]
    assert thresholds == [0.65, 0.10, 0.3, 0.3, 0.3, 0.2, 0.3, 0.5, 0.9]
    assert verdicts["aspectAccuracy/tone"].state is VerdictState.FAIL


@pytest.mark.parametrize(("hits", "n"), [(0, 2995), (1, 4742), (2, 6294), (3, 7752)])
def test_how_many_replies_show_a_tenth_of_a_percent(hits: int, n: int) -> None:
    assert replies_for_rate(hits, 0.001) == n
    assert rate_at_most("violationRate", hits, n, 0.001, "").state is VerdictState.PASS
    assert rate_at_most("violationRate", hits, n - 1, 0.001, "").state is VerdictState.NEED_MORE_DATA


def test_clean_replies_say_exactly_how_many_more() -> None:
    assert rate_at_most("violationRate", 0, 400, 0.001, "").needed == 2595


def test_newcombe_covers_a_difference() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(1000):
        first, second = wilson(rng.binomial(80, 0.85), 80), wilson(rng.binomial(120, 0.7), 120)
        interval = difference(first, second)
        covered += interval.lower <= 0.15 <= interval.upper
    assert 0.93 <= covered / 1000 <= 0.98


def test_answers_to_one_prompt_say_nothing_about_others() -> None:
    """A bootstrap over prompts draws the one prompt there is each time: its width of zero is no certainty."""
    rng, prompts = np.random.default_rng(1), ("the same",) * 200
    scores = rng.standard_normal(200)
    rewards = scores + 0.1 * rng.standard_normal(200)
    human = HumanScored(rewards.tolist(), scores.tolist(), rng.standard_normal(200).tolist(), prompts)
    pairs = HeldOut(np.full(200, 20.0), np.ones(200), prompts)
    verdicts = [
        *correlation_verdicts(human, 0.6, 0),
        length_verdict(human, 0.5, 0),
        calibration_verdict(pairs, 0.1, False, 0),
        accuracy_verdict("accuracy", pairs, 0.65),
    ]
    assert {verdict.metric: verdict.state for verdict in verdicts} == dict.fromkeys(
        ("humanCorrelation", "humanPearson", "lengthBias", "calibrationError", "accuracy"), VerdictState.NEED_MORE_DATA
    )


def test_fieller_covers_a_ratio() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(1000):
        bottom = rng.normal(1.2, 0.8, 60)
        top = 0.5 * bottom + rng.normal(0, 0.6, 60)
        interval = ratio_of_means(top, bottom)
        covered += interval.lower <= 0.5 <= interval.upper
    assert 0.93 <= covered / 1000 <= 0.97
    nothing = ratio_of_means(rng.normal(size=30), rng.normal(size=30))
    assert math.isinf(nothing.upper), "a denominator that may be zero says nothing"


def test_pearson_agrees_with_scipy_and_covers() -> None:
    rng, r, covered = np.random.default_rng(7), 0.6, 0
    for index in range(200):
        x = rng.standard_normal(150)
        y = r * x + math.sqrt(1 - r * r) * rng.standard_normal(150)
        draws = cluster_draws(range(150), np.random.default_rng(index), 400)
        interval = pearson(x.tolist(), y.tolist(), draws)
        assert interval.estimate == pytest.approx(scipy_stats.pearsonr(x, y).statistic, abs=1e-9)
        covered += interval.lower <= r <= interval.upper
    assert covered / 200 >= 0.90


def test_small_intervals() -> None:
    assert absolute(Interval(5, -0.1, -0.3, 0.2)) == Interval(5, 0.1, 0.0, 0.3)
    assert absolute(Interval(5, -0.2, -0.3, -0.1)) == Interval(5, 0.2, 0.1, 0.3)
    found = student_mean([1.0, 2.0, 3.0])
    low, high = scipy_stats.t.interval(0.95, 2, loc=2.0, scale=1 / math.sqrt(3))
    assert (found.lower, found.upper) == pytest.approx((low, high))
