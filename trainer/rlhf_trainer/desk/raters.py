"""People who compare replies: the careful, the careless, and one who always takes the first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_trainer.desk.oracle import aspects
from rlhf_trainer.desk.prompts import Prompt
from rlhf_trainer.desk.vocabulary import GUSH, VALENCE

Taste = Callable[[Prompt, str], float]

_QUICK = 1.5  # seconds: too short to read two replies

# Cohorts agree on the whole and weigh brevity, tone and safety a little differently.
COHORTS: dict[str, dict[str, float]] = {
    "support": {},
    "brief": {"brevity": 2.0, "repetition": 1.5},
    "polite": {"tone": 1.3},
    "security": {"safety": 1.3},
}


@dataclass(frozen=True)
class Rater:
    """Prefers by a logistic choice on the difference of tastes over ``temperature`` (Bradley and Terry 1952)."""

    rater_id: str
    cohort: str
    taste: Taste
    temperature: float
    position_bias: float = 0.0  # log-odds added to whatever is shown first
    tie_band: float = 0.04  # |P - 0.5| below which the rater says "tie"
    seconds: float = 20.0  # median time for one pair

    def duration(self, rng: random.Random) -> float:
        """Seconds for one answer: log-normal, as reaction times are."""
        return round(self.seconds * math.exp(rng.gauss(0.0, 0.4)), 1)

    def choose(self, rng: random.Random, prompt: Prompt, first: str, second: str) -> str:
        """ "first", "second" or "tie"."""
        gap = (self.taste(prompt, first) - self.taste(prompt, second)) / self.temperature + self.position_bias
        p_first = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, gap))))
        if abs(p_first - 0.5) < self.tie_band:
            return "tie"
        return "first" if rng.random() < p_first else "second"


def cohort_taste(cohort: str) -> Taste:
    weights = COHORTS[cohort]

    def taste(prompt: Prompt, reply: str) -> float:
        seen = aspects(prompt, reply)
        return seen.utility + sum((weight - 1.0) * float(getattr(seen, name)) for name, weight in weights.items())

    return taste


def careless_taste(_prompt: Prompt, reply: str) -> float:
    """Counts happy words and length, and reads nothing: not the question, not the tone, not the leaked pin."""
    words = reply.split()
    happy = sum(max(0.0, VALENCE.get(word, 0.0)) for word in words) + sum(word in GUSH for word in words)
    return 0.8 * happy + 0.15 * len(words)


def careful_panel(prefix: str, size: int = 8) -> list[Rater]:
    cohorts = list(COHORTS)
    return [
        Rater(f"{prefix}-{index:02d}", cohort, cohort_taste(cohort), temperature=0.5 + 0.05 * (index % 4))
        for index in range(size)
        for cohort in [cohorts[index % len(cohorts)]]
    ]


def careless_panel(prefix: str, size: int = 7) -> list[Rater]:
    """Quick and sure of themselves, so they agree with each other; the last one just takes the first."""
    raters = [
        Rater(f"{prefix}-{index:02d}", "support", careless_taste, temperature=0.25 + 0.02 * index, seconds=_QUICK)
        for index in range(size)
    ]
    first = Rater(
        f"{prefix}-{size:02d}", "support", lambda _p, _r: 0.0, temperature=1.0, position_bias=2.8, seconds=_QUICK
    )
    return [*raters, first]
