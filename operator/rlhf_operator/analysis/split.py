"""Is traffic split as configured? A sequential sample-ratio test.

Under the configured share the arm of each conversation is a coin of known bias; against it stands a Beta mixture of
biases centred on it. The ratio of the two is a martingale that depends on the two counts alone (Lindon and Malek
2022, "Anytime-valid inference for multinomial count data"). A wrong split means a broken route or a wrong weight, and
then no comparison of the arms means anything.
"""

from __future__ import annotations

import math

CONCENTRATION = 100.0  # pseudo-conversations behind the mixture's prior
ALPHA = 0.001  # per stage; a crossing holds the ramp, it does not roll back


def log_e_value(candidates: int, stables: int, share: float) -> float:
    """Log Bayes factor of "another split" against `share` in (0, 1)."""
    a, b = CONCENTRATION * share, CONCENTRATION * (1.0 - share)
    mixture = _log_beta(a + candidates, b + stables) - _log_beta(a, b)
    return mixture - candidates * math.log(share) - stables * math.log1p(-share)


def mismatch(candidates: int, stables: int, share: float, alpha: float = ALPHA) -> bool:
    return log_e_value(candidates, stables, share) >= -math.log(alpha)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
