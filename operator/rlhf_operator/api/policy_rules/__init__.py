"""What must hold between the fields of a PolicyOptimizationJob: each rule once, for API server and operator.

An algorithm gets exactly the inputs and fields it reads. What it would ignore is refused, because a user who names
it believes that it acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_operator.api.policy_rules.judging import EVALUATION
from rlhf_operator.api.policy_rules.learning import FIELDS, INPUTS, SAMPLING
from rlhf_operator.api.policy_rules.objective import CONSTRAINTS, DISTILLATION, POLICY_GRADIENT
from rlhf_operator.api.policy_rules.rule import Rule, one_of

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec

__all__ = ["RULES", "Rule", "broken", "one_of"]

RULES: tuple[Rule, ...] = (
    *INPUTS,
    *FIELDS,
    *SAMPLING,
    *POLICY_GRADIENT,
    *CONSTRAINTS,
    *DISTILLATION,
    *EVALUATION,
)


def broken(spec: PolicyOptimizationJobSpec) -> str:
    """The messages of the rules that do not hold; "" when all do."""
    return "; ".join(rule.message for rule in RULES if not rule.holds(spec))
