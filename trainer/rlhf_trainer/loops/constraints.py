"""Bounds on mean costs during training: what a reply costs, and the multipliers that price it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_trainer.algos.lagrangian import Multiplier
from rlhf_trainer.config import Constraint, Cost, PolicyTraining
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.rollout import Experience
from rlhf_trainer.safety.scorer import LinearFilter
from rlhf_trainer.wire import AttemptConfig


class Constraints:
    """The Lagrange multipliers of a run; with no constraint configured everything here is empty."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self._multipliers = {
            each.cost: Multiplier(
                value=min(each.initial_multiplier, each.max_multiplier),
                limit=each.limit,
                learning_rate=each.learning_rate,
                maximum=each.max_multiplier,
                window=each.window,
            )
            for each in constraints
        }

    def __bool__(self) -> bool:
        return bool(self._multipliers)

    @property
    def multipliers(self) -> dict[Cost, float]:
        return {cost: multiplier.value for cost, multiplier in self._multipliers.items()}

    def update(self, experience: Experience) -> None:
        """One step of dual ascent on the costs of a step's replies."""
        for cost, multiplier in self._multipliers.items():
            multiplier.update(cost_of(cost, experience).tolist())

    def figures(self, experience: Experience) -> dict[str, float]:
        """Mean cost of the step and multiplier it was priced with, and how many constraints look out of reach."""
        if not self:
            return {}
        figures: dict[str, float] = {}
        for cost, multiplier in self._multipliers.items():
            figures[f"{cost.value}Cost"] = float(cost_of(cost, experience).mean())
            figures[f"{cost.value}Multiplier"] = multiplier.value
        unsatisfied = sum(multiplier.unsatisfied for multiplier in self._multipliers.values())
        return figures | {"unsatisfiedConstraints": float(unsatisfied)}

    def state(self) -> dict[str, Any]:
        return {
            cost.value: {"value": multiplier.value, "costs": list(multiplier.costs)}
            for cost, multiplier in self._multipliers.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for cost, multiplier in self._multipliers.items():
            multiplier.value = float(state[cost.value]["value"])
            multiplier.costs.clear()
            multiplier.costs.extend(state[cost.value]["costs"])


def cost_of(cost: Cost, experience: Experience) -> Tensor:
    """(B,) what each reply costs."""
    if cost is Cost.LENGTH:
        return experience.lengths.float()
    if cost is Cost.INCOMPLETE:
        return (~experience.finished).float()
    return experience.violations


def safety_filter(config: AttemptConfig, training: PolicyTraining) -> LinearFilter | None:
    """The filter that a constraint on safety costs is measured by; None without such a constraint."""
    if Cost.SAFETY not in [constraint.cost for constraint in training.constraints]:
        return None
    if config.safety_filter is None:
        raise Invalid(
            "training.constraints: cost safety is measured by spec.evaluation.safetyFilter, which is not set; "
            "name a filter there or remove the constraint"
        )
    return LinearFilter.read(Path(config.safety_filter.path))
