"""Which inputs an algorithm lives on: a missing one is refused with its remedy, and so is one that would be ignored."""

from __future__ import annotations

from rlhf_trainer.config import ONLINE, READ_BY, Algorithm, Evaluation, Opponent, PolicyTraining
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
_SAMPLES = ONLINE | {Algorithm.DISTILLATION}


def check_needs(config: AttemptConfig, training: PolicyTraining) -> None:
    """Raises Invalid naming the first field that is missing or of no use, and what to do."""
    algorithm = training.algorithm
    for name, located in _given(config).items():
        readers = READ_BY.get(name, _SAMPLES)
        if algorithm in readers and located is None:
            raise Invalid(f"spec.{name} is missing: {algorithm.value} learns from it; {_REMEDIES[name]}")
        if located is not None and algorithm not in readers and name in READ_BY:
            users = ", ".join(other.value for other in Algorithm if other in readers)
            raise Invalid(
                f"spec.{name} is given, but {algorithm.value} makes no use of it; remove it, "
                f"or set training.algorithm to one of {users}"
            )
    if algorithm not in ONLINE:
        _check_offline(training)
    _check_evaluation(config, config.evaluation or Evaluation(), algorithm)


def _check_offline(training: PolicyTraining) -> None:
    """Settings that only sampling against a reward could honour."""
    ignored = {"constraints": bool(training.constraints), "overlong": training.overlong is not None}
    if training.algorithm is not Algorithm.DISTILLATION:
        ignored["samplesPerPrompt"] = training.samples_per_prompt > 1
    for field, given in ignored.items():
        if given:
            raise Invalid(
                f"training.{field} is given, but {training.algorithm.value} makes no use of it; remove it, "
                "or choose an algorithm that samples against a reward model"
            )


def _check_evaluation(config: AttemptConfig, evaluation: Evaluation, algorithm: Algorithm) -> None:
    if evaluation.against is not Opponent.TEACHER:
        return
    if algorithm is not Algorithm.DISTILLATION:
        raise Invalid(f"evaluation.against is teacher, but {algorithm.value} has none; set it to policy")
    if config.audit_reward_model is None:
        raise Invalid("evaluation.against is teacher, but nothing can judge the two; give an auditRewardModel")


def _given(config: AttemptConfig) -> dict[str, Located | None]:
    return {
        "rewardModel": config.reward_model,
        "prompts": config.prompts,
        "preferences": config.preferences,
        "demonstrations": config.demonstrations,
        "teacher": config.teacher,
    }
