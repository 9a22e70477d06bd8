"""Over-optimisation (Gao et al. 2022): the proxy goes on rising while what it stands for falls. Pure rules.

A look scores the policy's replies to the same held-out prompts, drawn with the same random numbers, by the reward
model (proxy) and by an audit model, both as z-scores against the base's replies. Looks are compared prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf_trainer.config import OverOptimization
from rlhf_trainer.evals.stats import Interval, student_mean
from rlhf_trainer.evals.verdicts import at_most, unknown
from rlhf_trainer.wire import Verdict

METRIC = "overOptimization"


@dataclass(frozen=True)
class Look:
    """z-scores of the replies [P] after ``step`` steps, in prompt order."""

    step: int
    proxy: tuple[float, ...]
    audit: tuple[float, ...]

    @property
    def mean_proxy(self) -> float:
        return float(np.mean(self.proxy))

    @property
    def mean_audit(self) -> float:
        return float(np.mean(self.audit))

    @property
    def gap(self) -> Interval:
        """Mean of proxy minus audit."""
        return student_mean(np.array(self.proxy) - np.array(self.audit))


@dataclass(frozen=True)
class Finding:
    """What one look adds; ``breach`` says which rule fired and why, None when none did."""

    look: Look
    streak: int
    breach: str | None


class Detector:
    """The rules over a run's looks. Its whole state is JSON, so a resumed run decides as an undisturbed one."""

    def __init__(self, wanted: OverOptimization) -> None:
        self._wanted = wanted
        self._recent: list[Look] = []  # as many as the slope rule looks back
        self._streak = 0
        self.best: Look | None = None

    def take(self, look: Look) -> Finding:
        """Takes one look into account."""
        before = self._recent[-1] if self._recent else None
        diverging = before is not None and look.mean_proxy > before.mean_proxy and look.mean_audit < before.mean_audit
        self._streak = self._streak + 1 if diverging else 0
        self._recent = [*self._recent, look][-(self._wanted.patience + 1) :]
        if self.best is None or look.mean_audit > self.best.mean_audit:
            self.best = look
        return Finding(look, self._streak, self._slope() or self._gap(look))

    def reset(self) -> None:
        """After a pause: an acknowledged divergence must last ``patience`` looks anew to act again."""
        self._streak = 0

    def state(self) -> dict[str, Any]:
        looks = [asdict(look) for look in self._recent]
        return {"recent": looks, "streak": self._streak, "best": None if self.best is None else asdict(self.best)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._recent = [_look(one) for one in state["recent"]]
        self._streak = int(state["streak"])
        self.best = None if state["best"] is None else _look(state["best"])

    def _slope(self) -> str | None:
        """Proxy up and audit down ``patience`` looks in a row, and the audit's fall over them more than chance."""
        if self._streak < self._wanted.patience:
            return None
        start, end = self._recent[0], self._recent[-1]
        fall = student_mean(np.array(end.audit) - np.array(start.audit))
        if fall.upper >= 0:
            return None
        rise = end.mean_proxy - start.mean_proxy
        return (
            f"over {self._wanted.patience} looks the reward model rose by {rise:.2f} and the audit fell by "
            f"{-fall.estimate:.2f} [{-fall.upper:.2f}, {-fall.lower:.2f}] standard deviations of the base"
        )

    def _gap(self, look: Look) -> str | None:
        gap = look.gap
        if gap.lower <= self._wanted.max_gap:
            return None
        return (
            f"the reward model sees {gap.estimate:.2f} [{gap.lower:.2f}, {gap.upper:.2f}] standard deviations of the "
            f"base more than the audit does; maxGap is {self._wanted.max_gap:g}"
        )


def verdict(look: Look | None, wanted: OverOptimization) -> Verdict:
    """On the weights that are published: Pass when the gap of proxy and audit lies below maxGap on its upper bound."""
    if look is None:
        return unknown(METRIC, wanted.max_gap, "the run ended before its first look; lower overOptimization.everySteps")
    note = f"proxy minus audit in standard deviations of the base at step {look.step}, of the published weights"
    return at_most(METRIC, look.gap, wanted.max_gap, note)


def standardised(scores: Sequence[float], base: Sequence[float]) -> tuple[float, ...]:
    """z-scores against the base's replies; a base whose replies all score alike leaves differences as they are."""
    reference = np.array(base, dtype=np.float64)
    spread = float(reference.std()) or 1.0
    return tuple(((np.array(scores, dtype=np.float64) - reference.mean()) / spread).tolist())


def _look(state: Mapping[str, Any]) -> Look:
    return Look(int(state["step"]), tuple(state["proxy"]), tuple(state["audit"]))
