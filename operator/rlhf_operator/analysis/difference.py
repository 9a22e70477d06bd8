"""By how much does the candidate's rate differ from stable's? A confidence sequence by betting.

To bound d = p_candidate - p_stable from above, a gambler bets against "d >= delta" with stake lambda:

    a candidate conversation pays   1 + lambda * (delta - bad)
    a stable conversation pays      1 + lambda * odds * bad          odds = candidates per stable conversation

With conversations assigned at random in these odds, the expected pay of an arriving conversation is
1 + share * lambda * (delta - (p_candidate - p_stable)) <= 1 under the hypothesis, whatever the rates are at that
moment: the base rate may drift and the weight may change (the inverse-probability weighting of Waudby-Smith et al.
2022, with the betting of Waudby-Smith and Ramdas 2024). Wealth averaged over a grid of stakes is a supermartingale;
the deltas at which it stays below 1/alpha form the sequence. Smaller odds make it slower, never wrong.

The bound from below is the same game with the arms changed over. For rates p this loses a factor near 1/(1 - p)
against the optimal bet: nothing for the rare events that guardrails are about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_operator.analysis.harm import log_mean_exp

# Stakes per conversation of the first arm. From below the first arm is stable: a stake on one of its many
# conversations is a stake of 1/odds on one of the candidate's few, so the grid goes far down.
UPPER_STAKES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95)
LOWER_STAKES = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 4e-3, 0.01, 0.025, 0.06, 0.15, 0.35, 0.7, 0.95)

_BISECTIONS = 22  # of [-1, 1]: to half a millionth


@dataclass(frozen=True)
class Bets:
    """Wealth against "p_first - p_second >= delta" for every delta at once.

    `offsets[i]` is the log pay of the second arm's bad conversations at stake i; the first arm's follows from its
    counts.
    """

    stakes: tuple[float, ...]
    units: int
    bad: int
    offsets: tuple[float, ...]

    @classmethod
    def start(cls, stakes: tuple[float, ...]) -> Bets:
        return cls(stakes, 0, 0, (0.0,) * len(stakes))

    def updated(self, units: int, bad: int, second_bad: int, odds: float) -> Bets:
        """After further `units` of the first arm, `bad` of them, and `second_bad` of the second.

        `odds` (first to second) must follow from exposures and configuration alone, never from these outcomes.
        """
        offsets = tuple(
            old + second_bad * math.log1p(stake * odds) for old, stake in zip(self.offsets, self.stakes, strict=True)
        )
        return replace(self, units=self.units + units, bad=self.bad + bad, offsets=offsets)

    def log_wealths(self, delta: float) -> list[float]:
        """Per stake; -inf where the stake is too large for this delta."""
        return [
            self.units * math.log1p(stake * delta)
            + self.bad * (math.log1p(stake * (delta - 1.0)) - math.log1p(stake * delta))
            + offset
            if stake * (1.0 - delta) < 1.0
            else -math.inf
            for stake, offset in zip(self.stakes, self.offsets, strict=True)
        ]

    def log_wealth(self, delta: float) -> float:
        return log_mean_exp(self.log_wealths(delta))

    def excludes(self, delta: float, alpha: float) -> bool:
        """Whether "the difference is delta or more" is refuted at level alpha."""
        return self.log_wealth(delta) >= -math.log(alpha)

    def bound(self, alpha: float) -> float:
        """The smallest refuted difference, in [-1, 1]; 1 when none is."""
        low, high = -1.0, 1.0
        if not self.excludes(high, alpha):
            return high
        for _ in range(_BISECTIONS):  # wealth grows in delta
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.excludes(middle, alpha) else (middle, high)
        return high

    def needed(self, delta: float, alpha: float, first_rate: float, second_rate: float, odds: float) -> int | None:
        """Further units of the first arm until `delta` is refuted, were the rates to stay as given; None: never."""
        goal = -math.log(alpha)
        now = self.log_wealths(delta)
        growth = [_growth(stake, delta, first_rate, second_rate, odds) for stake in self.stakes]
        if log_mean_exp(now) >= goal:
            return 0
        if max(growth) <= 0.0:
            return None

        def reached(units: int) -> bool:
            return log_mean_exp([wealth + units * rate for wealth, rate in zip(now, growth, strict=True)]) >= goal

        high = 1
        while not reached(high):
            high *= 2
            if high > 1 << 40:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


def _growth(stake: float, delta: float, first_rate: float, second_rate: float, odds: float) -> float:
    """Expected log pay per unit of the first arm, with the second arm's bad conversations that come with it."""
    if stake * (1.0 - delta) >= 1.0:
        return -math.inf
    own = (1.0 - first_rate) * math.log1p(stake * delta) + first_rate * math.log1p(stake * (delta - 1.0))
    return own + second_rate / odds * math.log1p(stake * odds)
