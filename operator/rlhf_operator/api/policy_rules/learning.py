"""What an algorithm learns from: exactly the inputs and fields it reads, sampled as it can use them."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from rlhf_operator.api.policy_rules.rule import Rule, names, one_of
from rlhf_trainer.config import (
    ACTS_WHEN,
    GROUPED,
    READ_BY,
    TRAINING_READ_BY,
    Algorithm,
    Condition,
    PolicyTraining,
    is_ignored,
    is_set,
)

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec

_DEFAULTS = PolicyTraining().model_dump(mode="json", by_alias=True)


def _input_rules(field: str, readers: frozenset[Algorithm]) -> tuple[Rule, Rule]:
    attribute = {"rewardModel": "reward_model"}.get(field, field)

    def named(spec: PolicyOptimizationJobSpec) -> bool:
        return getattr(spec, attribute) is not None

    verb = "learns" if len(readers) == 1 else "learn"
    return (
        Rule(
            f"!({one_of(readers)}) || has(self.{field})",
            lambda spec: spec.training.algorithm not in readers or named(spec),
            f"{names(readers)} {verb} from {field}: add spec.{field}, or choose another training.algorithm",
            f".{field}",
        ),
        Rule(
            f"!has(self.{field}) || {one_of(readers)}",
            lambda spec: not named(spec) or spec.training.algorithm in readers,
            f"only {names(readers)} {verb} from {field}: remove spec.{field}, or choose another training.algorithm",
            f".{field}",
        ),
    )


def _field_rule(field: str, readers: frozenset[Algorithm]) -> Rule:
    """A field or block that others read is at its default, which the API server has filled in."""
    default = reduce(dict.__getitem__, field.split("."), _DEFAULTS)
    verb = "reads" if len(readers) == 1 else "read"
    return Rule(
        f"{one_of(readers)} || ({_equal(f'self.training.{field}', default)})",
        lambda spec: not is_ignored(spec.training, field),
        f"only {names(readers)} {verb} training.{field}: leave it out, or choose another training.algorithm",
        f".training.{field}",
    )


def _condition_rule(condition: Condition) -> Rule:
    """A field that needs another to act is at its default without it."""
    default = reduce(dict.__getitem__, condition.field.split("."), _DEFAULTS)
    return Rule(
        f"({condition.cel}) || ({_equal(f'self.training.{condition.field}', default)})",
        lambda spec: condition.holds(spec.training) or not is_set(spec.training, condition.field),
        f"training.{condition.field} does nothing unless {condition.says}: leave it out, or set that",
        f".training.{condition.field}",
    )


def _equal(path: str, default: Any) -> str:
    """In CEL: what is at the path is this JSON value."""
    if isinstance(default, dict):
        return " && ".join(_equal(f"{path}.{name}", value) for name, value in default.items())
    if default is None:
        return f"!has({path})"
    if default == []:
        return f"!has({path}) || size({path}) == 0"
    return f"{path} == {str(default).lower() if isinstance(default, bool) else repr(default)}"


INPUTS = tuple(rule for field, readers in READ_BY.items() for rule in _input_rules(field, readers))

SAMPLING = (
    Rule(
        f"!({one_of(GROUPED)}) || self.training.samplesPerPrompt >= 2",
        lambda spec: spec.training.algorithm not in GROUPED or spec.training.samples_per_prompt >= 2,
        f"{names(GROUPED)} compare the samples of a prompt: set training.samplesPerPrompt to 2 or more",
        ".training.samplesPerPrompt",
    ),
    Rule(
        "!has(self.training.overlong) || self.training.overlong.start < self.training.generation.maxNewTokens",
        lambda spec: (
            spec.training.overlong is None or spec.training.overlong.start < spec.training.generation.max_new_tokens
        ),
        "training.overlong.start must be less than training.generation.maxNewTokens, where the penalty is full",
        ".training.overlong.start",
    ),
)

FIELDS = (
    *(_field_rule(field, readers) for field, readers in TRAINING_READ_BY.items()),
    *map(_condition_rule, ACTS_WHEN),
)
