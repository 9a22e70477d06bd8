"""The simulation of whole rollouts, reduced: the aims hold, and a wrong unit of judgement is caught breaking them."""

from __future__ import annotations

import pytest
from scipy import stats

from benchmarks.rollout_simulation import KINDS, Traffic, clopper_pearson, rollouts, simulate

RUNS = 12


def shares(traffic: Traffic, harm: float) -> dict[str, float]:
    results = rollouts(RUNS, traffic, harm, workers=1)
    outcomes = [result.outcome for result in results]
    return {name: outcomes.count(name) / RUNS for name in ("aborted", "promoted", "undecided")}


@pytest.mark.parametrize("traffic", KINDS)
def test_without_harm_rollouts_are_promoted(traffic: Traffic) -> None:
    found = shares(traffic, 1.0)
    assert found["aborted"] <= 0.2  # at a level of 3 %, three of twelve happen once in 200 times
    assert found["promoted"] >= 0.6


@pytest.mark.parametrize("harm", [2.0, 10.0])
def test_harm_is_aborted_and_never_promoted(harm: float) -> None:
    assert shares("independent", harm) == {"aborted": 1.0, "promoted": 0.0, "undecided": 0.0}


def test_more_harm_is_found_sooner() -> None:
    mild = [result.samples for result in rollouts(RUNS, "drifting", 2.0, workers=1)]
    grave = [result.samples for result in rollouts(RUNS, "drifting", 10.0, workers=1)]
    assert sorted(grave)[RUNS // 2] < sorted(mild)[RUNS // 2] / 3


def test_judging_requests_of_dependent_conversations_breaks_the_level() -> None:
    """The negative control: were the unit the request, harmless candidates would be aborted."""
    aborted = sum(r.outcome == "aborted" for r in rollouts(60, "dependent, by request", 1.0, workers=1))
    assert aborted > stats.binom.ppf(0.999, 60, 0.03)  # 0.03: what three guardrails at 1 % may err together


def test_a_rollout_is_a_function_of_its_seed() -> None:
    assert simulate(7, "dependent", 2.0) == simulate(7, "dependent", 2.0)


def test_clopper_pearson_is_the_exact_interval() -> None:
    low, high = clopper_pearson(0, 1000)
    assert low == 0.0
    assert high == pytest.approx(0.003682, abs=1e-5)
