"""Our side: the loop of the worker, whole, with its session, metrics and history."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.training import attempt
from benchmarks.trl_peers.pipe import Stepper
from benchmarks.trl_peers.world import LONGEST_PROMPT, SAMPLES, SIZES, endless, limit
from rlhf_trainer.config import Evaluation, PolicyTraining, RewardModelTraining, RewardModelValidation
from rlhf_trainer.distributed import join
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import Session, StopSignal
from rlhf_trainer.loops.online import OnlineTrainer
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig, Located
from rlhf_trainer.worker import load_loop, run_attempt

STEPS = 10_000


def main(world: Path, algorithm: str, size_name: str, lengths: str) -> None:
    torch.set_num_threads(1)
    stepper, plain = Stepper(), Session.finish_step
    if endless(lengths):
        OnlineTrainer.generator = _endless  # type: ignore[method-assign, assignment]

    def finish_step(session: Session, done: int, metrics: Mapping[str, float]) -> None:
        plain(session, done, metrics)
        stepper.ended(metrics.get("responseLength", 0.0))

    Session.finish_step = finish_step  # type: ignore[method-assign, assignment]
    output = Path(tempfile.mkdtemp(prefix="trl-steps-"))
    os.environ["RLHF_STATUS_PORT"], os.environ["RLHF_RANKS_FOLDER"] = "0", str(output / "ranks")
    config = _config(world, output, algorithm, SIZES[size_name].rows, lengths)
    result = run_attempt(
        config, load_loop(config.kind), join(timedelta(seconds=600)), RankFiles.from_environment(), StopSignal()
    )
    raise SystemExit(result.message)  # a step was still expected


def _endless(trainer: Any, lm: Any) -> CachedGenerator:
    """No reply ends before the limit."""
    return CachedGenerator(lm, pad_id=trainer._inputs.encoder.pad_id, eos_id=-1)


def _config(world: Path, output: Path, algorithm: str, rows: int, lengths: str) -> AttemptConfig:
    fields: dict[str, Any] = attempt(output, "steps", 1)
    pairs = Located(path=str(world / f"pairs-{lengths}.jsonl"))
    policy = Located(path=str(world / "policy"))
    if algorithm == "Reward":
        training = RewardModelTraining(
            epochs=100, global_batch_size=rows, max_length=128, ensemble={"members": 1}, deepspeed={"zero_stage": 0},
            learning_rate=1e-4, holdout_fraction=0.1, micro_batch_size=rows,
        )  # fmt: skip
        fields |= {"kind": "RewardModelJob", "base_model": policy, "preferences": pairs}
        return AttemptConfig(**fields, reward_model_training=training, validation=RewardModelValidation())
    samples = SAMPLES if algorithm in ("GRPO", "RLOO") else 1
    training_policy = PolicyTraining.model_validate(
        {
            "algorithm": algorithm,
            "steps": STEPS,
            "learning_rate": 1e-5,
            "prompts_per_step": rows // samples,
            "samples_per_prompt": samples,
            "max_prompt_length": LONGEST_PROMPT[lengths],
            "generation": {"max_new_tokens": limit(lengths)},
            "deepspeed": {"zero_stage": 0},
            **_options(algorithm),
        }
    )
    fields |= {"kind": "PolicyOptimizationJob", "policy": policy, "policy_training": training_policy}
    if algorithm == "DPO":
        return AttemptConfig(**fields, preferences=pairs, evaluation=Evaluation(samples=16))
    prompts = Located(path=str(world / f"prompts-{lengths}.jsonl"))
    reward = Located(path=str(world / "reward"))
    return AttemptConfig(**fields, prompts=prompts, reward_model=reward, evaluation=Evaluation(samples=16))


def _options(algorithm: str) -> dict[str, Any]:
    """One pass over the batch, and the same KL as TRL's."""
    if algorithm == "DPO":
        return {}
    once: dict[str, Any] = {"epochs": 1, "mini_batches": 1}
    options: dict[str, Any] = {"ppo": once, "kl": {"coefficient": 0.04}, "missing_eos_penalty": 0.0}
    if algorithm == "PPO":
        return {**options, "ppo": {**once, "critic": "separate"}}  # as TRL's value model is
    if algorithm == "GRPO":
        placement = {"placement": "loss", "estimator": "k3", "controller": "fixed", "coefficient": 0.04}
        return {**options, "kl": placement, "loss_normalization": "sequence"}
    return options


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
