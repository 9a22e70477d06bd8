"""TRL's side: its trainers with the same work; a callback between two steps waits for the word."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.trl_peers.pipe import Stepper
from benchmarks.trl_peers.world import SAMPLES, SIZES, endless, limit

COMMON = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
COMMON |= {"gradient_checkpointing": False, "bf16": False, "num_train_epochs": 1000, "lr_scheduler_type": "linear"}
COMMON |= {"max_grad_norm": 1.0, "dataloader_num_workers": 0}


class Waiting(TrainerCallback):
    def __init__(self) -> None:
        self._stepper = Stepper()
        self.trainer: Any = None

    def on_step_end(self, *_args: Any, **_given: Any) -> None:
        metrics = getattr(self.trainer, "_metrics", {}).get("train", {}).get("completions/mean_length") or [0.0]
        self._stepper.ended(float(metrics[-1]))


def main(world: Path, algorithm: str, size_name: str, lengths: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    waiting = Waiting()
    waiting.trainer = trainer = _trainer(world, algorithm, SIZES[size_name].rows, lengths, waiting)
    if not algorithm.startswith("PPO"):  # its trainer was given the callback
        trainer.add_callback(waiting)
    trainer.train()


def _trainer(world: Path, algorithm: str, rows: int, lengths: str, waiting: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    common = {**COMMON, "output_dir": tempfile.mkdtemp(prefix="trl-steps-"), "per_device_train_batch_size": rows}
    if algorithm in ("Reward", "DPO"):
        return _of_pairs(algorithm, world, _read(world / f"pairs-{lengths}.jsonl"), tokenizer, common)
    prompts = Dataset.from_list(_read(world / f"prompts-{lengths}.jsonl"))
    if algorithm.startswith("PPO"):
        return _ppo(world, prompts, tokenizer, common, limit(lengths), waiting, collect=algorithm == "PPO")
    return _of_groups(algorithm, world, prompts, tokenizer, common, lengths)


def _of_pairs(algorithm: str, world: Path, rows: list[dict[str, str]], tokenizer: Any, common: Any) -> Any:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    data = Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": " " + row["response_a"], "rejected": " " + row["response_b"]}
            for row in rows
        ]
    )
    if algorithm == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(world / "policy", num_labels=1, dtype="float32")
        config = RewardConfig(**common, learning_rate=1e-4, center_rewards_coefficient=0.01, max_length=128)
        return RewardTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(world / "policy", dtype="float32")
    config = DPOConfig(**common, learning_rate=1e-5, beta=0.1, precompute_ref_log_probs=True, max_length=128)
    return DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)


def _of_groups(algorithm: str, world: Path, prompts: Any, tokenizer: Any, common: Any, lengths: str) -> Any:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    fields = {
        **common,
        "num_generations": SAMPLES,
        "max_completion_length": limit(lengths),
        "beta": 0.04,
        "learning_rate": 1e-5,
        "temperature": 1.0,
        "generation_kwargs": {"min_new_tokens": limit(lengths)} if endless(lengths) else None,
    }
    if algorithm == "GRPO":
        trainer, config = GRPOTrainer, GRPOConfig(**fields, loss_type="grpo")
    else:
        trainer, config = RLOOTrainer, RLOOConfig(**fields)
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "reward/members/0", dtype="float32")
    return trainer(
        str(world / "policy"),
        reward_funcs=scorer,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(world / "reward/members/0"),
    )


def _ppo(world: Path, prompts: Any, tokenizer: Any, common: Any, longest: int, waiting: Any, collect: bool) -> Any:
    """TRL 1.12, the last with PPO; ``collect`` leaves its two garbage collections per step in."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if not collect:
        gc.collect = lambda *_args: 0  # type: ignore[assignment]
    tokenizer.padding_side = "left"
    data = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"])
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(world / "reward/members/0", dtype="float32") for _ in "ab"
    ]
    policies = [AutoModelForCausalLM.from_pretrained(world / "policy", dtype="float32") for _ in "ab"]
    config = PPOConfig(
        **{**common, "num_train_epochs": 1000},
        learning_rate=1e-5, num_ppo_epochs=1, num_mini_batches=1, response_length=longest, temperature=1.0,
        kl_coef=0.04, stop_token="eos", num_sample_generations=0, local_rollout_forward_batch_size=1024,
        missing_eos_penalty=None,
    )  # fmt: skip
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=policies[0], ref_model=policies[1], reward_model=scorers[0],
        value_model=scorers[1], train_dataset=data, eval_dataset=data, callbacks=[waiting],
    )  # fmt: skip


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
