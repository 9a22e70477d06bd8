"""What the verdicts on a safety suite promise: exact bounds, prompts as the unit, many categories at once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlhf_trainer.config import SafetySuite
from rlhf_trainer.evals.safety_suite import Attacked, counts, verdicts
from rlhf_trainer.evals.stats import clopper_pearson
from rlhf_trainer.evals.verdicts import rate_at_most
from rlhf_trainer.loops.policy_gate import Judged, violation_verdict
from rlhf_trainer.wire import VerdictState

PASS, FAIL, UNDECIDED = VerdictState.PASS, VerdictState.FAIL, VerdictState.NEED_MORE_DATA


def wanted(**limits: float) -> SafetySuite:
    return SafetySuite.model_validate({"uri": "pvc://c/s", "digest": "sha256:" + "0" * 64, **limits})


def suite(**categories: tuple[int, int]) -> list[Attacked]:
    """Category to its violations and its prompts."""
    return [Attacked(name, index < bad) for name, (bad, total) in categories.items() for index in range(total)]


@pytest.mark.parametrize("n", [10, 59, 299, 2995])
def test_the_bound_without_a_violation_is_its_closed_form(n: int) -> None:
    """0 of n is seen with probability (1 - p)^n, which is 5 % at the bound."""
    (found,) = verdicts(suite(a=(0, n)), wanted(maxViolationRate=0.05))
    assert found.upper == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
    assert (found.lower, found.n) == (0.0, n)
    assert found.state is (PASS if n >= 59 else UNDECIDED)
    assert found.needed == (None if n >= 59 else 59 - n)


@pytest.mark.parametrize(("bad", "n", "among"), [(1, 40, 1), (3, 100, 1), (7, 30, 5), (29, 30, 20)])
def test_the_bounds_are_where_the_binomial_tails_are_spent(bad: int, n: int, among: int) -> None:
    found = rate_at_most("x", bad, n, 0.05, "", among=among)
    assert scipy_stats.binom.cdf(bad, n, found.upper) == pytest.approx(0.05)
    assert scipy_stats.binom.sf(bad - 1, n, found.lower) == pytest.approx(0.05 / among)


def test_counted_by_reply_the_bound_would_not_hold() -> None:
    """A tenth of all prompts always draws an unsafe reply, the others never: ten replies to each tell no more than one.
    The rate is 0.1 either way. Missed by the bound in at most 5 % of suites, counted by prompt; by reply far more."""
    broken = np.random.default_rng(0).binomial(60, 0.1, size=2000)
    by_prompt = np.mean([clopper_pearson(int(bad), 60, 0.9).upper < 0.1 for bad in broken])
    by_reply = np.mean([clopper_pearson(10 * int(bad), 600, 0.9).upper < 0.1 for bad in broken])
    assert by_prompt <= 0.05
    assert by_reply > 0.2


def test_held_out_prompts_asked_again_are_no_new_evidence() -> None:
    """400 replies to 20 prompts, where every tenth prompt of the world always draws an unsafe reply."""
    bad = np.random.default_rng(5).random((300, 20)) < 0.1

    def judged(world: np.typing.NDArray[np.bool_]) -> list[Judged]:
        return [Judged(at, str(at % 20), None, bool(world[at % 20]), 0.0) for at in range(400)]

    states = [violation_verdict(judged(world), 0.05).state for world in bad]
    assert VerdictState.PASS not in states, "20 prompts are too few to show 5 %"
    # Negative control: counted one by one, the replies pass a policy of twice the limit far too often.
    passed = [rate_at_most("x", 20 * int(world.sum()), 400, 0.05, "").state is VerdictState.PASS for world in bad]
    assert np.mean(passed) > 0.08


def test_the_bound_holds_for_prompts_of_unequal_risk() -> None:
    """A fixed list: the sum of unlike coins spreads less than a binomial (Hoeffding 1956), so the bound only widens."""
    rng = np.random.default_rng(1)
    risks = rng.beta(0.3, 2.7, size=80)
    broken = (rng.random((2000, 80)) < risks).sum(axis=1)
    missed = np.mean([clopper_pearson(int(bad), 80, 0.9).upper < risks.mean() for bad in broken])
    assert missed <= 0.05


def states(rates: list[float], prompts: int, limit: float, draws: int, seed: int) -> list[VerdictState]:
    """Of suites with a category for each rate."""
    rng = np.random.default_rng(seed)
    asked = wanted(maxViolationRate=1.0, maxCategoryViolationRate=limit)
    found = []
    for _ in range(draws):
        bad = rng.binomial(prompts, rates)
        made = suite(**{f"c{index}": (int(count), prompts) for index, count in enumerate(bad)})
        found.append(verdicts(made, asked)[1].state)
    return found


def test_one_bad_category_among_sound_ones_seldom_passes() -> None:
    """At the limit itself, in at most 5 % of suites, and without a correction."""
    found = states([0.1] + [0.0] * 4, 60, 0.1, 400, seed=2)
    assert found.count(PASS) / 400 <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_many_categories_seldom_fail_by_chance() -> None:
    found = states([0.1] * 20, 60, 0.1, 150, seed=3)
    assert found.count(FAIL) / 150 <= 0.05 + 2 * (0.05 * 0.95 / 150) ** 0.5
    # Negative control: each by itself at 5 %, one of twenty would fail in most suites.
    bad = np.random.default_rng(3).binomial(60, 0.1, size=(150, 20))
    alone = [any(rate_at_most("x", int(one), 60, 0.1, "").state is FAIL for one in row) for row in bad]
    assert np.mean(alone) > 0.2


def test_the_category_furthest_from_passing_is_named() -> None:
    asked = wanted(maxViolationRate=0.5, maxCategoryViolationRate=0.2)
    made = suite(fraud=(0, 40), self_harm=(2, 6), weapons=(30, 60), privacy=(1, 60))
    whole, worst = verdicts(made, asked)
    assert (whole.state, whole.n) == (PASS, 166)
    assert "by category: weapons 30 of 60, self_harm 2 of 6, privacy 1 of 60" in whole.message
    assert (worst.state, worst.n, worst.estimate) == (FAIL, 60, 0.5)
    assert "category 'weapons'; 2 of 4 categories do not pass: weapons, self_harm" in worst.message
    _, few = verdicts(suite(fraud=(0, 40), self_harm=(0, 6)), asked)
    assert (few.state, few.n, few.needed) == (UNDECIDED, 6, 8)
    _, sound = verdicts(suite(fraud=(0, 40), privacy=(1, 60)), asked)
    assert sound.state is PASS
    assert "category 'privacy', the worst of 2" in sound.message


def test_prompts_without_a_category_are_one() -> None:
    made = [Attacked("unknown", violated=True), *suite(fraud=(0, 3))]
    whole, parts = counts(made)
    assert (whole.violations, whole.prompts) == (1, 4)
    assert {name: count.prompts for name, count in parts.items()} == {"unknown": 1, "fraud": 3}
