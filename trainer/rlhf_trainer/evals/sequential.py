"""Win rates that may be looked at after every comparison: e-processes and the confidence bound they imply.

Looking again and again at a fixed-n interval finds a winner where there is none (about one time in five over twenty
looks at 95 %). An e-process bets against the hypothesis; under it the stake exceeds 1/alpha at any time with
probability at most alpha (Ville 1939; Ramdas et al. 2023), so one may stop whenever one likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from rlhf_trainer.evals.stats import Interval

_MOST = 10_000_000  # results: nobody waits for more


def e_value(results: Sequence[float], at_most: float) -> float:
    """Evidence against "the mean result is at most ``at_most``" after these results in [0, 1], ties ½.

    The uniform mixture over p in (at_most, 1) of the likelihood ratios (p/q)^x ((1-p)/(1-q))^(1-x), q = ``at_most``.
    For results between 0 and 1 the weighted mean of the two ratios bounds each factor, so its expectation is at most 1
    whenever the mean is at most q. ``e_value(...) >= 1 / alpha`` rejects at level alpha at any time.
    """
    return math.exp(min(700.0, log_e_value(results, at_most)))


def log_e_value(results: Sequence[float], at_most: float) -> float:
    """Logarithm of ``e_value``, in closed form: an incomplete Beta function."""
    if not 0.0 < at_most < 1.0:
        raise ValueError(f"the hypothesis' mean is {at_most}; it must lie strictly between 0 and 1")
    return _log_evidence(*_counts(results), at_most)


def anytime_lower_bound(results: Sequence[float], alpha: float = 0.05) -> float:
    """Largest mean that the results rule out at level ``alpha``, valid at every time; 0 when they rule out none."""
    won, lost = _counts(results)
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(50):  # the evidence falls as the hypothesis moves up, so bisection finds where it crosses
        middle = (low + high) / 2
        low, high = (middle, high) if _log_evidence(won, lost, middle) >= -math.log(alpha) else (low, middle)
    return low


def anytime_interval(results: Sequence[float], alpha: float = 0.05) -> Interval:
    """Mean result with an interval that holds at every time together, with probability 1 - alpha."""
    lost = [1.0 - result for result in results]
    lower, upper = anytime_lower_bound(results, alpha / 2), 1.0 - anytime_lower_bound(lost, alpha / 2)
    return Interval(len(results), math.fsum(results) / len(results), lower, upper)


def needed_to_exceed(results: Sequence[float], at_most: float, alpha: float) -> int | None:
    """Further results until ``at_most`` is ruled out if their mean stays; None when it never would be."""
    mean, n = math.fsum(results) / len(results), len(results)
    if mean <= at_most:
        return None

    def decides(size: int) -> bool:
        return _log_evidence(mean * size, (1 - mean) * size, at_most) >= -math.log(alpha)

    low, high = n, n
    while not decides(high):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high - n


def _counts(results: Sequence[float]) -> tuple[float, float]:
    """Won and lost; a tie is half of each."""
    if any(not 0.0 <= result <= 1.0 for result in results):
        raise ValueError("results must lie in [0, 1]: 1 won, 0 lost, 1/2 a tie")
    won = math.fsum(results)
    return won, len(results) - won


def _log_evidence(won: float, lost: float, at_most: float) -> float:
    tail = float(special.betaincc(won + 1, lost + 1, at_most))  # of Beta(won+1, lost+1) beyond the hypothesis
    if tail <= 0.0:
        return -math.inf
    mixture = float(special.betaln(won + 1, lost + 1)) + math.log(tail) - math.log1p(-at_most)
    return mixture - won * math.log(at_most) - lost * math.log1p(-at_most)
