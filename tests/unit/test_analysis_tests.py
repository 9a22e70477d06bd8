"""The sequential tests against closed forms and statsmodels, and by simulation beside a test that is known to fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from rlhf_operator.analysis import harm, latency, split
from rlhf_operator.analysis.difference import LOWER_STAKES, UPPER_STAKES, Bets

counts = st.integers(0, 30)
shares = st.floats(0.001, 0.999)


# harm: conditional binomial e-process


@given(candidate=counts, stable=counts, share=shares)
def test_the_e_value_is_the_mean_of_binomial_likelihood_ratios(candidate: int, stable: int, share: float) -> None:
    log_e = harm.log_e_value(harm.updated(harm.START, candidate, stable, share))
    bad = candidate + stable
    ratios = [
        stats.binom.pmf(candidate, bad, theta * share / (theta * share + 1 - share))
        / stats.binom.pmf(candidate, bad, share)
        for theta in harm.RATE_RATIOS
        if stats.binom.pmf(candidate, bad, share) > 1e-280
    ]
    if len(ratios) == len(harm.RATE_RATIOS):
        assert math.exp(log_e) == pytest.approx(np.mean(ratios), rel=1e-6)


@given(bad=st.integers(0, 40), share=shares)
def test_its_expectation_under_no_harm_is_one(bad: int, share: float) -> None:
    total = sum(
        stats.binom.pmf(k, bad, share) * math.exp(harm.log_e_value(harm.updated(harm.START, k, bad - k, share)))
        for k in range(bad + 1)
    )
    assert total == pytest.approx(1.0, rel=1e-6)


@given(candidate=counts, stable=counts, share=st.floats(0.01, 0.9), more=st.floats(0.0, 0.09))
def test_a_share_that_is_too_large_only_makes_it_slower(candidate: int, stable: int, share: float, more: float) -> None:
    exact = harm.log_e_value(harm.updated(harm.START, candidate, stable, share))
    assert harm.log_e_value(harm.updated(harm.START, candidate, stable, share + more)) <= exact + 1e-9


@given(steps=st.lists(st.tuples(counts, counts), min_size=1, max_size=6), share=shares)
def test_one_update_is_as_good_as_many(steps: list[tuple[int, int]], share: float) -> None:
    piecewise = harm.START
    for candidate, stable in steps:
        piecewise = harm.updated(piecewise, candidate, stable, share)
    at_once = harm.updated(harm.START, sum(c for c, _ in steps), sum(s for _, s in steps), share)
    assert piecewise == pytest.approx(at_once, abs=1e-7)


# difference: betting confidence sequence


@given(share=st.floats(0.001, 0.99), p=st.floats(0.0, 0.5), delta=st.floats(0.001, 0.5))
def test_the_expected_pay_at_the_hypothesis_is_one(share: float, p: float, delta: float) -> None:
    odds = share / (1 - share)
    for stake in UPPER_STAKES:
        candidate = (1 - p - delta) * (1 + stake * delta) + (p + delta) * (1 + stake * (delta - 1))
        stable = 1 + p * stake * odds
        assert share * candidate + (1 - share) * stable == pytest.approx(1.0, abs=1e-9)


@given(units=st.integers(0, 500), bad=st.integers(0, 50), other=st.integers(0, 50), odds=st.floats(0.01, 10.0))
def test_wealth_grows_with_the_difference_so_that_one_bound_holds_it(
    units: int, bad: int, other: int, odds: float
) -> None:
    bets = Bets.start(UPPER_STAKES).updated(units + bad, bad, other, odds)
    wealths = [bets.log_wealth(delta) for delta in (-0.5, -0.1, 0.0, 0.01, 0.1, 0.5, 1.0)]
    assert wealths == sorted(wealths)
    bound = bets.bound(0.05)
    assert bound == 1.0 or bets.excludes(bound, 0.05)


@pytest.mark.parametrize(("margin", "exact"), [(0.01, 299), (0.05, 59), (0.002, 1497)])
def test_without_bad_conversations_it_needs_little_more_than_the_exact_fixed_sample(margin: float, exact: int) -> None:
    """exact: n with (1 - margin)^n <= 5 %, of which no test valid at one look can do with less."""
    needed = Bets.start(UPPER_STAKES).needed(margin, 0.05, 0.0, 0.0, 1.0)
    assert needed is not None
    assert exact < needed < 2.0 * exact
    assert Bets.start(UPPER_STAKES).updated(needed, 0, 0, 1.0).excludes(margin, 0.05)
    assert not Bets.start(UPPER_STAKES).updated(needed - 1, 0, 0, 1.0).excludes(margin, 0.05)
    assert proportion_confint(0, needed, alpha=0.1, method="beta")[1] < margin


@pytest.mark.parametrize(("p", "q"), [(0.02, 0.02), (0.1, 0.05), (0.01, 0.05)])
def test_the_interval_holds_the_fixed_sample_interval_and_the_truth(p: float, q: float) -> None:
    n = 4000
    x, y = round(n * p), round(n * q)
    upper = Bets.start(UPPER_STAKES).updated(n, x, y, 1.0).bound(0.025)
    lower = -Bets.start(LOWER_STAKES).updated(n, y, x, 1.0).bound(0.025)
    fixed = confint_proportions_2indep(x, n, y, n, method="newcomb", alpha=0.05)
    assert lower < fixed[0] < p - q < fixed[1] < upper
    assert upper - lower < 3.0 * (fixed[1] - fixed[0])


def test_needed_is_none_when_the_rates_seen_never_show_the_margin() -> None:
    bets = Bets.start(UPPER_STAKES).updated(1000, 50, 10, 1.0)
    assert bets.needed(0.01, 0.05, 0.05, 0.01, 1.0) is None


# split


@given(n=st.integers(0, 60), share=st.floats(0.01, 0.99))
def test_the_split_test_is_a_bayes_factor_of_expectation_one(n: int, share: float) -> None:
    total = sum(stats.binom.pmf(k, n, share) * math.exp(split.log_e_value(k, n - k, share)) for k in range(n + 1))
    assert total == pytest.approx(1.0, rel=1e-6)
    mixture = stats.betabinom(n, 100.0 * share, 100.0 * (1 - share))
    assert split.log_e_value(n, 0, share) == pytest.approx(
        mixture.logpmf(n) - stats.binom.logpmf(n, n, share), rel=1e-6, abs=1e-6
    )


def test_a_dead_route_and_a_wrong_weight_are_found_and_the_right_one_is_not() -> None:
    assert split.mismatch(0, 2000, 0.01)
    assert split.mismatch(60, 2000, 0.01)
    assert split.mismatch(400, 600, 0.5)
    assert not split.mismatch(10, 990, 0.01)
    assert not split.mismatch(480, 520, 0.5)
    assert not split.mismatch(0, 0, 0.01)


# latency


@given(st.lists(st.integers(0, 200), min_size=2, max_size=12))
def test_at_most_a_twentieth_of_the_reference_is_above_the_threshold(reference: list[int]) -> None:
    first_slow = latency.threshold(reference)
    if sum(reference) < latency.MIN_REFERENCE:
        assert first_slow is None
    else:
        assert first_slow is not None
        assert latency.slow(reference, first_slow) <= 0.05 * sum(reference)
        assert first_slow == 1 or latency.slow(reference, first_slow - 1) > 0.05 * sum(reference)


@given(st.lists(st.floats(1.0, 1e5), min_size=1, max_size=12, unique=True).map(sorted), st.floats(0.5, 2e5))
def test_no_bucket_that_may_hold_an_answer_within_the_limit_is_slow(bounds: list[float], limit: float) -> None:
    first_slow = latency.beyond(limit, bounds)
    below = [float("-inf"), *bounds]  # of bucket i answers are above this
    assert all(low >= limit for low in below[first_slow:])
    assert below[first_slow - 1] < limit  # and no bucket more is let off


def test_the_reference_is_bounded_and_starts_again_with_other_buckets() -> None:
    reference: tuple[int, ...] = ()
    for _ in range(100):
        reference = latency.remembered(reference, (90, 10, 0))
    assert sum(reference) <= latency.MAX_REFERENCE
    assert latency.threshold(reference) == 2
    assert latency.remembered(reference, (1, 2)) == (1, 2)


# Anytime validity by simulation, with a negative control

LOOKS, PER_LOOK, RUNS = 150, 40, 400


def _null_counts(rng: np.random.Generator, share: float) -> tuple[np.ndarray, ...]:
    """Cumulative counts per look of both arms alike, on a base rate that swings between 0 and 10 %."""
    rate = 0.05 * (1.0 + np.sin(np.arange(LOOKS) / 8.0))
    n_c = rng.binomial(PER_LOOK, share, (RUNS, LOOKS))
    n_s = PER_LOOK - n_c
    return n_c, n_s, rng.binomial(n_c, rate), rng.binomial(n_s, rate)


def _upper_limit(level: float) -> float:
    """What a false-alarm count exceeds with probability 0.1 % if the level is kept."""
    return float(stats.binom.ppf(0.999, RUNS, level)) / RUNS


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_looking_after_every_batch_keeps_the_level_and_a_peeking_z_test_does_not(share: float) -> None:
    rng = np.random.default_rng(5)
    n_c, n_s, x_c, x_s = _null_counts(rng, share)
    alpha = 0.05
    thetas = np.array(harm.RATE_RATIOS)[:, None, None]
    log_e = np.cumsum(x_c * np.log(thetas) - (x_c + x_s) * np.log(thetas * share + 1 - share), axis=-1)
    peak = np.log(np.mean(np.exp(log_e), axis=0)).max(axis=-1)
    assert np.mean(peak >= -math.log(alpha)) <= _upper_limit(alpha)
    bets = np.cumsum(_log_pay(n_c, x_c, x_s, share / (1 - share), 0.0), axis=-1)
    wrong_pass = np.log(np.mean(np.exp(bets), axis=0)).max(axis=-1) >= -math.log(alpha)  # "difference >= 0" is true
    assert np.mean(wrong_pass) <= _upper_limit(alpha)
    assert np.mean(_peeking_z_test(n_c, n_s, x_c, x_s, alpha)) > 0.12  # the negative control


def _log_pay(n_c: np.ndarray, x_c: np.ndarray, x_s: np.ndarray, odds: float, delta: float) -> np.ndarray:
    stakes = np.array(UPPER_STAKES)[:, None, None]
    own = n_c * np.log1p(stakes * delta) + x_c * (np.log1p(stakes * (delta - 1)) - np.log1p(stakes * delta))
    return own + x_s * np.log1p(stakes * odds)


def _peeking_z_test(n_c: np.ndarray, n_s: np.ndarray, x_c: np.ndarray, x_s: np.ndarray, alpha: float) -> np.ndarray:
    """Whether a one-sided two-proportion z-test at level alpha is ever crossed when repeated at every look."""
    a, b, x, y = (np.cumsum(v, axis=1) for v in (n_c, n_s, x_c, x_s))
    pooled = (x + y) / np.maximum(a + b, 1)
    error = np.sqrt(np.maximum(pooled * (1 - pooled) * (1 / np.maximum(a, 1) + 1 / np.maximum(b, 1)), 1e-12))
    z = (x / np.maximum(a, 1) - y / np.maximum(b, 1)) / error
    return np.asarray((z[:, 5:] > stats.norm.isf(alpha)).any(axis=1))


def test_the_vectorised_simulation_is_the_shipped_test() -> None:
    """The arrays above must be the code under test, not a look-alike."""
    rng = np.random.default_rng(6)
    n_c, _, x_c, x_s = (v[0] for v in _null_counts(rng, 0.1))
    log_e, bets = harm.START, Bets.start(UPPER_STAKES)
    for n, x, y in zip(n_c.tolist(), x_c.tolist(), x_s.tolist(), strict=True):
        log_e, bets = harm.updated(log_e, x, y, 0.1), bets.updated(n, x, y, 1 / 9)
    thetas = np.array(harm.RATE_RATIOS)
    assert log_e == pytest.approx(
        (x_c.sum() * np.log(thetas) - (x_c + x_s).sum() * np.log(thetas * 0.1 + 0.9)).tolist()
    )
    pays = np.cumsum(_log_pay(n_c[None], x_c[None], x_s[None], 1 / 9, 0.02), axis=-1)[:, 0, -1]
    assert bets.log_wealths(0.02) == pytest.approx(pays.tolist())
