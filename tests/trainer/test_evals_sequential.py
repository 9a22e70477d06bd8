"""Looking as often as one likes: the e-process keeps its promise, a fixed-n interval does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from rlhf_trainer.evals.sequential import anytime_lower_bound, e_value, log_e_value
from rlhf_trainer.evals.stats import wilson

ALPHA = 0.05
RUNS = 4000


def wins(p: float, n: int, seed: int) -> np.ndarray:
    """Cumulative wins [RUNS, n] of a policy that wins with probability p."""
    return np.cumsum(np.random.default_rng(seed).random((RUNS, n)) < p, axis=1)


def crossing(counts: np.ndarray, at_most: float = 0.5) -> np.ndarray:
    """First comparison [RUNS] after which the e-process of every run reaches 1/alpha; n + 1 where it never does."""
    n = counts.shape[1]
    table = np.full((n + 1, n + 1), -np.inf)
    for total in range(1, n + 1):
        for won in range(total + 1):
            table[total, won] = log_e_value([1.0] * won + [0.0] * (total - won), at_most)
    reached = table[np.arange(1, n + 1)[None, :], counts] >= -math.log(ALPHA)
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, n + 1)


@pytest.mark.parametrize(("won", "lost", "q"), [(7, 3, 0.5), (0, 4, 0.5), (30.5, 9.5, 0.6), (300, 100, 0.55)])
def test_the_closed_form_is_the_mixture(won: float, lost: float, q: float) -> None:
    def ratio(p: float) -> float:
        return float((p / q) ** won * ((1 - p) / (1 - q)) ** lost / (1 - q))

    expected, _ = integrate.quad(ratio, q, 1, epsabs=0, epsrel=1e-10, limit=200)
    results = [1.0] * int(won) + [0.0] * int(lost) + [0.5] * round(2 * (won - int(won)))
    assert e_value(results, q) == pytest.approx(expected, rel=1e-6)


def test_looking_after_every_comparison_keeps_the_error() -> None:
    """Ville: a policy no better than its base is called better with probability at most alpha, at any time."""
    false = float((crossing(wins(0.5, 200, seed=1)) <= 200).mean())
    assert false <= ALPHA
    assert false > 0.005, "a test that never rejects would also pass"


def test_peeking_at_a_fixed_interval_does_not() -> None:
    """Negative control: twenty looks at a 95 % bound find a winner in about a fifth of all draws (measured: 21.8 %)."""
    counts = wins(0.5, 400, seed=2)
    looks = np.arange(20, 401, 20)
    lower = {n: np.array([wilson(won, n, 0.90).lower for won in range(n + 1)]) for n in looks}
    passed = np.array([lower[n][counts[:, n - 1]] > 0.5 for n in looks])
    assert float(passed.any(axis=0).mean()) == pytest.approx(0.218, abs=0.025)
    assert float(passed[-1].mean()) == pytest.approx(0.05, abs=0.02), "one look alone would be honest"


def test_it_finds_a_better_policy_soon() -> None:
    assert 20 <= float(np.median(crossing(wins(0.7, 200, seed=3)))) <= 45


def test_ties_and_partial_wins_are_bets_too() -> None:
    """Results of 0, 1/2 and 1 with mean 1/2: the expected e-value stays at most one."""
    rng = np.random.default_rng(4)
    values = [e_value(rng.choice([0.0, 0.5, 1.0], 30, p=[0.3, 0.4, 0.3]).tolist(), 0.5) for _ in range(4000)]
    assert float(np.mean(values)) <= 1.0
    assert e_value([0.5] * 1000, 0.5) < 1.0


def test_the_bound_is_where_the_evidence_crosses() -> None:
    results = [1.0] * 70 + [0.0] * 30
    bound = anytime_lower_bound(results)
    assert 0.5 < bound < 0.7
    assert e_value(results, bound) == pytest.approx(20, rel=1e-3)
    assert bound < wilson(70, 100).lower, "looking at any time costs width"
    assert anytime_lower_bound([0.0] * 20) == pytest.approx(0.0, abs=1e-6)


def test_what_is_no_result_is_refused() -> None:
    with pytest.raises(ValueError, match="0, 1"):
        log_e_value([1.2], 0.5)
    with pytest.raises(ValueError, match="hypothesis"):
        log_e_value([1.0], 1.0)
