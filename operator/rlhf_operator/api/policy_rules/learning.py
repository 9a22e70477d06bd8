"""What an algorithm learns from: exactly the inputs and blocks it reads, sampled as it can use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_operator.api.policy_rules.rule import FROM_TEXTS, Rule, names, one_of
from rlhf_trainer.config import DPO, GROUPED, GRPO, KTO, ONLINE, READ_BY, Algorithm, Distillation, Spec

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec

_BLOCKS: tuple[tuple[str, type[Spec], frozenset[Algorithm]], ...] = (
    ("grpo", GRPO, frozenset({Algorithm.GRPO})),
    ("dpo", DPO, frozenset({Algorithm.DPO})),
    ("kto", KTO, frozenset({Algorithm.KTO})),
    ("distillation", Distillation, frozenset({Algorithm.DISTILLATION})),
)


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


def _block_rule(block: str, model: type[Spec], readers: frozenset[Algorithm]) -> Rule:
    """A block of another algorithm is at its defaults."""
    defaults = model().model_dump(mode="json", by_alias=True)
    same = " && ".join(f"self.training.{block}.{name} == {value!r}" for name, value in defaults.items())
    return Rule(
        f"{one_of(readers)} || ({same})",
        lambda spec: spec.training.algorithm in readers or getattr(spec.training, block) == model(),
        f"training.{block} is read by {names(readers)} alone: remove it, or choose that training.algorithm",
        f".training.{block}",
    )


INPUTS = tuple(rule for field, readers in READ_BY.items() for rule in _input_rules(field, readers))

SAMPLING = (
    Rule(
        f"!({one_of(GROUPED)}) || self.training.samplesPerPrompt >= 2",
        lambda spec: spec.training.algorithm not in GROUPED or spec.training.samples_per_prompt >= 2,
        f"{names(GROUPED)} compare the samples of a prompt: set training.samplesPerPrompt to 2 or more",
        ".training.samplesPerPrompt",
    ),
    Rule(
        f"!({one_of(FROM_TEXTS)}) || self.training.samplesPerPrompt == 1",
        lambda spec: spec.training.algorithm not in FROM_TEXTS or spec.training.samples_per_prompt == 1,
        f"{names(FROM_TEXTS)} sample nothing while training: remove training.samplesPerPrompt",
        ".training.samplesPerPrompt",
    ),
    Rule(
        f"!has(self.training.overlong) || {one_of(ONLINE)}",
        lambda spec: spec.training.overlong is None or spec.training.algorithm in ONLINE,
        f"training.overlong lowers the reward of long responses, so it goes with {names(ONLINE)}: remove it",
        ".training.overlong",
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

BLOCKS = tuple(_block_rule(*block) for block in _BLOCKS)
