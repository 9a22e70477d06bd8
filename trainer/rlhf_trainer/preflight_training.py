"""What the configuration of a training alone gives away: batch arithmetic, guardrails that can never be judged."""

from __future__ import annotations

from rlhf_trainer.config import (
    FROM_PREFERENCES,
    ONLINE,
    Algorithm,
    GuardrailMetric,
    PolicyTraining,
    RewardModelTraining,
)
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import AttemptConfig

_LOWEST_TEMPERATURE = 0.05  # below it a softmax in float32 is an argmax, and log-probabilities overflow its gradient
_M = GuardrailMetric
_TEXT = frozenset({_M.ENTROPY, _M.RESPONSE_LENGTH, _M.GRADIENT_NORM})
_IMPLICIT = frozenset({_M.CHOSEN_REWARD, _M.REWARD_MARGIN})

# What each loop reports at every step; a guardrail on anything else would watch nothing.
REPORTED: dict[Algorithm, frozenset[GuardrailMetric]] = {
    **dict.fromkeys(ONLINE, frozenset(_M) - _IMPLICIT),
    **dict.fromkeys(FROM_PREFERENCES, _TEXT | _IMPLICIT),
    Algorithm.SFT: _TEXT,
    Algorithm.DISTILLATION: _TEXT | {_M.CLIPPED_FRACTION},
}
REPORTED_BY_REWARD_MODEL = frozenset({_M.GRADIENT_NORM})


def reported(config: AttemptConfig) -> frozenset[GuardrailMetric]:
    """The guardrail metrics of this attempt."""
    training = config.policy_training
    if training is None:
        return REPORTED_BY_REWARD_MODEL
    metrics = REPORTED[training.algorithm]
    if training.samples_per_prompt == 1:
        metrics -= {_M.ZERO_VARIANCE_FRACTION}  # of groups of one nothing can be said
    return metrics


def check_training(config: AttemptConfig) -> None:
    """Raises Invalid with the field and the remedy. Needs no file."""
    if config.kind == "RewardModelJob" and config.reward_model_training is None:
        raise Invalid("the attempt's configuration has no rewardModelTraining; recreate the resource")
    if config.kind == "PolicyOptimizationJob" and config.policy_training is None:
        raise Invalid("the attempt's configuration has no policyTraining; recreate the resource")
    _check_guardrails(config)
    if config.reward_model_training is not None:
        _check_reward_batch(config.reward_model_training, config.world_size)
    if config.policy_training is not None:
        _check_policy(config.policy_training, config.world_size)


def learnt_rows(training: PolicyTraining) -> int:
    """Rows of a step that gradients come from, over all ranks."""
    if training.algorithm is Algorithm.BEST_OF_N:
        return training.prompts_per_step
    return training.prompts_per_step * training.samples_per_prompt


def check_batch(rows_per_step: int, world_size: int, mini_batches: int, field: str) -> None:
    """``rows_per_step`` must divide over ranks and mini batches."""
    parts = world_size * mini_batches
    if rows_per_step % parts:
        below, above = rows_per_step // parts * parts, -(-rows_per_step // parts) * parts
        choices = f"{below} or {above}" if below else str(above)
        raise Invalid(
            f"training.{field} is {rows_per_step}, which does not divide over {world_size} ranks"
            + (f" and {mini_batches} mini batches" if mini_batches > 1 else "")
            + f"; choose {choices}"
        )


def check_micro_batch(rows_per_rank: int, micro: int | None) -> None:
    """``microBatchSize`` must divide a rank's rows of one optimiser step."""
    if micro is not None and rows_per_rank % micro:
        fitting = [part for part in range(1, rows_per_rank + 1) if rows_per_rank % part == 0]
        near = {max(part for part in fitting if part < micro), min((p for p in fitting if p > micro), default=1)}
        raise Invalid(
            f"training.microBatchSize is {micro}, which does not divide the {rows_per_rank} rows of a rank and step; "
            f"choose {' or '.join(str(part) for part in sorted(near))}"
        )


def _check_reward_batch(training: RewardModelTraining, world_size: int) -> None:
    check_batch(training.global_batch_size, world_size, 1, "globalBatchSize")
    check_micro_batch(training.global_batch_size // world_size, training.micro_batch_size)


def _check_policy(training: PolicyTraining, world_size: int) -> None:
    online = training.algorithm in ONLINE
    mini_batches = training.ppo.mini_batches if online else 1
    check_batch(training.prompts_per_step, world_size, mini_batches, "promptsPerStep")
    check_micro_batch(learnt_rows(training) // mini_batches // world_size, training.micro_batch_size)
    if online and training.generation.temperature < _LOWEST_TEMPERATURE:
        raise Invalid(
            f"training.generation.temperature is {training.generation.temperature:g}: nearly greedy sampling explores "
            f"nothing and its log-probabilities are noise; choose at least {_LOWEST_TEMPERATURE}, usually 1"
        )


def _check_guardrails(config: AttemptConfig) -> None:
    known = reported(config)
    for index, rail in enumerate(config.guardrails):
        where = f"spec.guardrails[{index}]"
        if rail.metric not in known:
            names = ", ".join(sorted(metric.value for metric in known))
            raise Invalid(
                f"{where}.metric is {rail.metric.value}, which this training never reports, so it would watch nothing; "
                f"choose one of {names}"
            )
        if rail.above is None and rail.below is None:
            raise Invalid(f"{where} has neither above nor below, so it can never act; set one of them")
        if rail.above is not None and rail.below is not None and rail.below >= rail.above:
            raise Invalid(
                f"{where}: below {rail.below:g} is not less than above {rail.above:g}, so every value breaches it; "
                "exchange them"
            )
