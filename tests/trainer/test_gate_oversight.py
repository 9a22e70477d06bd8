"""Rules against over-optimisation on known worlds: a proxy that is gold plus noise, and one that is sound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_trainer.config import BestOfNPreflight, GuardrailAction, OverOptimization
from rlhf_trainer.evals.best_of_n import judge, lifts
from rlhf_trainer.evals.over_optimization import Detector, Finding, Look, standardised, verdict
from rlhf_trainer.wire import VerdictState

WANTED = OverOptimization(samples=64, patience=3, max_gap=2.0, action=GuardrailAction.STOP)


def run(seed: int, noise: float, looks: int = 20) -> list[Look]:
    """Optimising a proxy = gold + ``noise`` x hack (Gao et al. 2022): the gold reward of d nats^1/2 is d(a - b d).

    The hack's share of the proxy grows with the distance from the base; without noise, gold and proxy rise alike.
    """
    rng = np.random.default_rng(seed)
    draws = rng.normal(0.0, 0.4, (2, WANTED.samples))  # common random numbers: a prompt keeps its luck
    found = []
    for step in range(1, looks + 1):
        distance = step / 5
        gold = distance * (1.0 - 0.3 * noise * distance)
        proxy = gold + noise * 0.35 * distance**2
        jitter = rng.normal(0.0, 0.05, (2, WANTED.samples))
        found.append(Look(step * 20, *(tuple(m + d + j) for m, d, j in zip((proxy, gold), draws, jitter, strict=True))))
    return found


def findings(looks: list[Look], wanted: OverOptimization = WANTED) -> list[Finding]:
    detector = Detector(wanted)
    return [detector.take(look) for look in looks]


@pytest.mark.parametrize("seed", range(10))
def test_an_over_optimised_run_is_stopped_after_the_audit_turned(seed: int) -> None:
    looks = run(seed, noise=1.0)
    found = findings(looks)
    first = next(index for index, one in enumerate(found) if one.breach is not None)
    top = int(np.argmax([look.mean_audit for look in looks]))
    assert top < first <= top + 6, "patience looks after the top, give or take its flatness"
    assert "fell by" in str(found[first].breach) or "maxGap" in str(found[first].breach)


@pytest.mark.parametrize("seed", range(10))
def test_a_sound_run_is_not(seed: int) -> None:
    assert all(one.breach is None for one in findings(run(seed, noise=0.0)))


def test_a_run_that_stays_where_it_is_seldom_raises_an_alarm() -> None:
    """No change at all, only noise: three looks in a row happen by chance, a significant fall hardly."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        looks = [Look(s, tuple(rng.normal(size=64)), tuple(rng.normal(size=64))) for s in range(20)]
        alarms += any(one.breach for one in findings(looks))
    assert alarms / 200 <= 0.05


def test_the_gap_alone_is_enough() -> None:
    wide = Look(20, tuple(3.0 + 0.1 * np.arange(32)), tuple(0.1 * np.arange(32)))
    assert "maxGap is 2" in str(Detector(WANTED).take(wide).breach)
    assert verdict(wide, WANTED).state is VerdictState.FAIL
    near = Look(20, tuple(1.0 + 0.1 * np.arange(32)), tuple(0.1 * np.arange(32)))
    assert Detector(WANTED).take(near).breach is None
    assert verdict(near, WANTED).state is VerdictState.PASS
    assert verdict(None, WANTED).state is VerdictState.UNKNOWN


def test_patience_is_counted_and_forgotten_by_an_acknowledgement() -> None:
    looks = run(0, noise=1.0)
    first = next(index for index, one in enumerate(findings(looks)) if one.streak >= 3 and one.breach)
    patient = OverOptimization(samples=64, patience=first + 20, max_gap=100.0)
    assert all(one.breach is None for one in findings(looks, patient))
    detector = Detector(WANTED)
    for look in looks[: first + 1]:
        detector.take(look)
    detector.reset()
    assert detector.take(looks[first + 1]).streak == 1


def test_a_breach_names_the_looks_that_its_figures_are_of() -> None:
    """One that goes on is still told by the last ``patience`` looks: each brings another tenth."""
    drift = 0.01 * np.arange(64)
    looks = [Look(step, tuple(0.1 * step + drift), tuple(-0.1 * step + drift**2)) for step in range(8)]
    for found in findings(looks)[3:]:
        assert "over 3 looks the reward model rose by 0.30 and the audit fell by 0.30" in str(found.breach)


def test_a_resumed_detector_decides_as_an_undisturbed_one() -> None:
    looks = run(3, noise=1.0)
    whole = findings(looks)
    for cut in (1, 7, 12):
        before, after = Detector(WANTED), Detector(WANTED)
        for look in looks[:cut]:
            before.take(look)
        after.restore(json.loads(json.dumps(before.state())))
        assert [after.take(look) for look in looks[cut:]] == whole[cut:]
        assert after.best == max(looks, key=lambda look: look.mean_audit)


def test_scores_are_measured_against_the_base() -> None:
    base = [1.0, 3.0]
    assert standardised([4.0], base) == (2.0,)
    assert standardised([5.0], [4.0, 4.0]) == (1.0,), "a base that scores alike has no spread to divide by"


def preflight(seed: int, agreement: float, prompts: int = 200, n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Gold, and a proxy that correlates with it by ``agreement``; prompts differ in level, which must not matter."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(prompts, n))
    proxy = agreement * gold + np.sqrt(1 - agreement**2) * rng.normal(size=(prompts, n))
    return proxy, gold


def test_the_lift_is_known_for_normal_scores() -> None:
    """The expected maximum of 16 normal draws is 1.766; a proxy that correlates by r keeps r of it."""
    proxy, gold = preflight(0, 0.6, prompts=4000)
    favourites = proxy.argmax(axis=1)
    assert float(lifts(proxy, favourites).mean()) == pytest.approx(1.766, abs=0.05)
    assert float(lifts(gold, favourites).mean()) == pytest.approx(0.6 * 1.766, abs=0.05)


@pytest.mark.parametrize(
    ("agreement", "lift", "ratio"),
    [
        (0.7, VerdictState.PASS, VerdictState.PASS),
        (0.15, VerdictState.PASS, VerdictState.FAIL),
        (-0.4, VerdictState.FAIL, VerdictState.FAIL),
    ],
)
def test_best_of_sixteen_tells_good_weak_and_careless_rewards_apart(
    agreement: float, lift: VerdictState, ratio: VerdictState
) -> None:
    first, second = judge(*preflight(1, agreement), BestOfNPreflight())
    assert (first.metric, first.state) == ("bestOfNLift", lift)
    assert (second.metric, second.state) == ("bestOfNLiftRatio", ratio)


def test_few_prompts_decide_nothing_and_say_how_many_would() -> None:
    _, ratio = judge(*preflight(2, 0.5, prompts=12), BestOfNPreflight())
    assert ratio.state is VerdictState.NEED_MORE_DATA
    assert ratio.needed


def test_a_constant_reward_is_no_evidence() -> None:
    proxy, gold = preflight(3, 0.5)
    (only,) = judge(np.zeros_like(proxy), gold, BestOfNPreflight())
    assert only.state is VerdictState.UNKNOWN
