"""Is the candidate worse than stable? A conditional binomial e-process over counts of bad conversations.

Given that some conversation went bad, it was the candidate's with probability `share` if both arms are alike, where
`share` is the candidate's share of the conversations. Against that stand alternatives in which the candidate's rate
is theta times stable's: then it was the candidate's with probability theta*s / (theta*s + 1 - s). The average of the
likelihood ratios over a grid of theta is a nonnegative supermartingale under "rate ratio at most 1", so by Ville's
inequality it ever reaches 1/alpha with probability at most alpha, whenever and however often one looks.

Conditioning on the bad conversations makes the base rate irrelevant, so it may drift; weights may change between
updates (Lindon et al. 2022, arXiv:2205.14762). The e-value falls in `share`, so a share that is too large only makes
the test slower, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RATE_RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0)
START = (0.0,) * len(RATE_RATIOS)


def updated(log_e: Sequence[float], candidate_bad: int, stable_bad: int, share: float) -> tuple[float, ...]:
    """Log likelihood ratios per rate ratio after further bad conversations.

    `share` in (0, 1) must follow from exposures and configuration alone, never from these outcomes.
    """
    return tuple(
        old + candidate_bad * math.log(theta) - (candidate_bad + stable_bad) * math.log(theta * share + 1.0 - share)
        for old, theta in zip(log_e, RATE_RATIOS, strict=True)
    )


def log_e_value(log_e: Sequence[float]) -> float:
    """Log of the mixture over the rate ratios, equal weights."""
    return log_mean_exp(log_e)


def log_mean_exp(values: Sequence[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(value - top) for value in values) / len(values))
