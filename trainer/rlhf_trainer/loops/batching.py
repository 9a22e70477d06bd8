"""Batch arithmetic of policy algorithms: rows of a step, of an optimiser step, of a backward pass."""

from __future__ import annotations

from rlhf_trainer.config import PolicyTraining
from rlhf_trainer.engine import EngineOptions
from rlhf_trainer.exits import Invalid
from rlhf_trainer.preflight_training import learnt_rows

_TOKENS_PER_PASS = 32_768  # of one rank: bounds the activations of a backward pass


def engine_options(training: PolicyTraining, world_size: int) -> EngineOptions:
    """Of the one engine. Raises Invalid when the rows do not divide; no weight need be loaded to find out."""
    rows = learnt_rows(training) // training.ppo.mini_batches
    return EngineOptions(
        zero_stage=training.deepspeed.zero_stage,
        learning_rate=training.learning_rate,
        rows_per_step=rows,
        micro_rows=micro_rows(training, rows // world_size),
        max_grad_norm=1.0,
        precision=training.precision,
    )


def micro_rows(training: PolicyTraining, own: int, responses: int = 1) -> int:
    """What the user asked for, or the largest divisor of a rank's ``own`` rows whose tokens fit a pass; a row has
    ``responses`` texts (a pair two). Raises Invalid when what was asked for does not divide them."""
    divisors = [part for part in range(1, own + 1) if own % part == 0]
    asked = training.micro_batch_size
    if asked is None:
        longest = responses * (training.max_prompt_length + training.generation.max_new_tokens)
        return max((part for part in divisors if part * longest <= _TOKENS_PER_PASS), default=1)
    if asked not in divisors:
        raise Invalid(
            f"training.microBatchSize is {asked}, which does not divide the {own} rows that a rank has per optimiser "
            f"step; choose {' or '.join(map(str, _nearest(divisors, asked)))}"
        )
    return asked


def _nearest(divisors: list[int], asked: int) -> list[int]:
    below = [part for part in divisors if part < asked][-1:]
    return below + [part for part in divisors if part > asked][:1]
