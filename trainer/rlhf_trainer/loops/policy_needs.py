"""What an algorithm lives on: a missing input is refused with its remedy, and so are inputs and fields that would be
ignored."""

from __future__ import annotations

from collections.abc import Set

from rlhf_trainer.config import (
    ACTS_WHEN,
    READ_BY,
    TRAINING_READ_BY,
    Algorithm,
    Evaluation,
    Opponent,
    PolicyTraining,
    is_ignored,
    is_set,
)
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import AttemptConfig, Located

_REMEDIES = {
    "rewardModel": "name a RewardModelJob (jobRef) or a reward model's folder",
    "prompts": "give a JSONL file of rows {prompt}",
    "preferences": "give a JSONL file of rows {prompt, response_a, response_b, preference}",
    "demonstrations": "give a JSONL file of rows {prompt, response}",
    "teacher": "name the policy to learn from, with the tokenizer of spec.policy",
}
# Beside READ_BY: who samples replies to prompts while training. The others are judged on them, where there are any.
SAMPLING = TRAINING_READ_BY["samplesPerPrompt"]


def check_needs(config: AttemptConfig, training: PolicyTraining) -> None:
    """Raises Invalid naming the first field that is missing or of no use, and what to do."""
    algorithm = training.algorithm
    for name, located in _given(config).items():
        readers = READ_BY.get(name, SAMPLING)
        if algorithm in readers and located is None:
            raise Invalid(f"spec.{name} is missing: {algorithm.value} learns from it; {_REMEDIES[name]}")
        if located is not None and algorithm not in readers and name in READ_BY:
            raise Invalid(
                f"spec.{name} is given, but {algorithm.value} makes no use of it; remove it, "
                f"or set training.algorithm to one of {_named(readers)}"
            )
    check_fields(training)
    _check_evaluation(config, config.evaluation or Evaluation(), algorithm)


def check_fields(training: PolicyTraining) -> None:
    """Raises Invalid naming every field that was set for nothing."""
    ignored = {field: readers for field, readers in TRAINING_READ_BY.items() if is_ignored(training, field)}
    idle = [each for each in ACTS_WHEN if is_set(training, each.field) and not each.holds(training)]
    told = [
        f"leave out training.{field}: {training.algorithm.value} does not read it, {_named(readers)} would"
        for field, readers in ignored.items()
    ] + [f"leave out training.{each.field}: it does nothing unless {each.says}" for each in idle]
    if told:
        raise Invalid("; ".join(told))


def _named(algorithms: Set[Algorithm]) -> str:
    """In the order in which the enum lists them."""
    return ", ".join(algorithm.value for algorithm in Algorithm if algorithm in algorithms)


def _check_evaluation(config: AttemptConfig, evaluation: Evaluation, algorithm: Algorithm) -> None:
    _check_suite(config, evaluation)
    if evaluation.against is not Opponent.TEACHER:
        return
    if algorithm is not Algorithm.DISTILLATION:
        raise Invalid(f"evaluation.against is teacher, but {algorithm.value} has none; set it to policy")
    if config.audit_reward_model is None:
        raise Invalid("evaluation.against is teacher, but nothing can judge the two; give an auditRewardModel")


def _check_suite(config: AttemptConfig, evaluation: Evaluation) -> None:
    if (config.safety_suite is None) != (evaluation.safety_suite is None):
        raise Invalid(
            "the attempt's configuration has only one of safetySuite and evaluation.safetySuite; recreate the resource"
        )
    if config.safety_suite is not None and config.safety_filter is None:
        raise Invalid(
            "spec.evaluation.safetySuite is given, but nothing judges the replies to it; name an "
            "evaluation.safetyFilter, or remove the suite"
        )


def _given(config: AttemptConfig) -> dict[str, Located | None]:
    return {
        "rewardModel": config.reward_model,
        "prompts": config.prompts,
        "preferences": config.preferences,
        "demonstrations": config.demonstrations,
        "teacher": config.teacher,
    }
