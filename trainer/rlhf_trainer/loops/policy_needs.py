"""Which inputs an algorithm lives on: a missing one is refused with its remedy, and so is one that would be ignored."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_trainer.config import ONLINE, Algorithm, Evaluation, Opponent, PolicyTraining
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import AttemptConfig, Located

_REMEDIES = {
    "rewardModel": "name a RewardModelJob (jobRef) or a reward model's folder",
    "prompts": "give a JSONL file of rows {prompt}",
    "preferences": "give a JSONL file of rows {prompt, response_a, response_b, preference}",
    "demonstrations": "give a JSONL file of rows {prompt, response}",
    "teacher": "name the policy to learn from, with the tokenizer of spec.policy",
}
_NEEDED: Mapping[Algorithm, tuple[str, ...]] = {
    **dict.fromkeys(ONLINE, ("rewardModel", "prompts")),
    Algorithm.DPO: ("preferences",),
    Algorithm.KTO: ("preferences",),
    Algorithm.SFT: ("demonstrations",),
    Algorithm.DISTILLATION: ("teacher", "prompts"),
}
# Of use whatever trains: prompts to evaluate on, and a reward model to judge by.
_ALWAYS_OF_USE = {"prompts", "rewardModel"}


def check_needs(config: AttemptConfig, training: PolicyTraining) -> None:
    """Raises Invalid naming the first field that is missing or of no use, and what to do."""
    algorithm = training.algorithm
    needed = _NEEDED[algorithm]
    for name, located in _given(config).items():
        if name in needed and located is None:
            raise Invalid(f"spec.{name} is missing: {algorithm.value} learns from it; {_REMEDIES[name]}")
        if located is not None and name not in (*needed, *_ALWAYS_OF_USE):
            users = ", ".join(other.value for other in Algorithm if name in _NEEDED[other])
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
    if config.reward_model is None and config.audit_reward_model is None:
        raise Invalid(
            "evaluation.against is teacher, but nothing can judge the two; give a rewardModel or an auditRewardModel"
        )


def _given(config: AttemptConfig) -> dict[str, Located | None]:
    return {
        "rewardModel": config.reward_model,
        "prompts": config.prompts,
        "preferences": config.preferences,
        "demonstrations": config.demonstrations,
        "teacher": config.teacher,
    }
