"""The simulation of whole rollouts, reduced: the aims hold, and a wrong unit of judgement is caught breaking them."""

from __future__ import annotations

import pytest
from scipy import stats

from benchmarks.rollout_simulation import ALPHA, KINDS, Traffic, clopper_pearson, rollouts, simulate
from rlhf_gateway.assignment import arm_of
from rlhf_operator.analysis.fold import Counts, RowName
from rlhf_operator.analysis.trial import Design, Metric, Trial, advanced
from rlhf_operator.analysis.verdict import failed
from rlhf_operator.api.policy_rollout import PolicyRollout
from rlhf_operator.api.policy_rollout_status import PolicyRolloutStatus, Revision, RevisionState
from rlhf_operator.kinds.policy_rollout import gateway
from rlhf_operator.kinds.policy_rollout.observe import View
from tests.unit.rollout_world import START, A, B, World, source

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


def test_people_who_come_back_in_every_stage_do_not_break_the_level() -> None:
    """Some always ask for what is refused, of either policy. Were they on one arm through all stages, a draw that was
    unlucky once would be counted again in each: 7 of these 80 were aborted so, at a level of 1 %."""
    aborted = sum(_returning_people_abort(trial) for trial in range(1, 81))
    assert aborted <= stats.binom.ppf(0.999, 80, ALPHA)


def _returning_people_abort(number: int, people: int = 500, risky: int = 2) -> bool:
    """One trial of a harmless candidate, with the assignment that the operator and the gateway make."""
    weights = range(5, 65, 5)
    world = World(stages=[{"weightPercent": weight} for weight in weights])
    primary = PolicyRollout.model_validate(world.primary)
    view = View(world.observed(), primary, PolicyRolloutStatus())
    a, b = (
        Revision(revision=f"desk-{digest[7]}", state=RevisionState.CANDIDATE, started_at=START, **source(digest))
        for digest in (A, B)
    )
    trial, designs = Trial(), {index: Design.of(weight, False) for index, weight in enumerate(weights)}
    for stage, weight in enumerate(weights):
        salt = gateway.wished(view, number, a, b, stage).salt
        on_canary = [arm_of(salt, f"user:{person}", weight) == "canary" for person in range(people)]
        for start in range(0, people, 100):  # as they are pulled, `risky` in a hundred
            canary, bad = sum(on_canary[start : start + 100]), sum(on_canary[start : start + 100][:risky])
            new = {
                RowName(stage, "canary"): Counts(conversations=canary, judged=canary, violating=bad),
                RowName(stage, "stable"): Counts(100 - canary, judged=100 - canary, violating=risky - bad),
            }
            trial = advanced(trial, new, designs)
            if failed(trial, Metric.SAFETY, 0.005, ALPHA):
                return True
    return False


def test_a_rollout_is_a_function_of_its_seed() -> None:
    assert simulate(7, "dependent", 2.0) == simulate(7, "dependent", 2.0)


def test_clopper_pearson_is_the_exact_interval() -> None:
    low, high = clopper_pearson(0, 1000)
    assert low == 0.0
    assert high == pytest.approx(0.003682, abs=1e-5)
