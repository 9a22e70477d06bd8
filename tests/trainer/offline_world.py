"""What algorithms that learn from given texts are tested on: the tiny world, demonstrations and a teacher."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.config import Evaluation, PolicyTraining
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer.ppo_world import PolicyWorld, make_policy_world
from tests.trainer.training_world import WORDS, TinyWorld, write_rows


@dataclass(frozen=True)
class OfflineWorld:
    policy: PolicyWorld
    preferences: Path
    demonstrations: Path
    teacher: Path

    def config(self, output: Path, training: PolicyTraining, world_size: int = 1, **changes: Any) -> AttemptConfig:
        """An attempt with just the inputs that its algorithm needs and nothing to judge it by."""
        located = {
            name: Located(path=str(path))
            for name, path in {
                "preferences": self.preferences,
                "demonstrations": self.demonstrations,
                "teacher": self.teacher,
                "prompts": self.policy.prompts,
            }.items()
        }
        needed = {
            "DPO": ("preferences",),
            "KTO": ("preferences",),
            "SFT": ("demonstrations",),
            "Distillation": ("teacher", "prompts"),
        }[training.algorithm.value]
        inputs = {name: at if name in needed else None for name, at in located.items()}
        fields = {"reward_model": None, "audit_reward_model": None, "evaluation": Evaluation(samples=16), **inputs}
        return self.policy.config(output, world_size, training=training, **{**fields, **changes})


def training_of(algorithm: str, **changes: Any) -> PolicyTraining:
    fields = {
        "algorithm": algorithm,
        "steps": 4,
        "prompts_per_step": 8,
        "learning_rate": 0.01,
        "generation": {"max_new_tokens": 7},
        "deepspeed": {"zero_stage": 2},
        "seed": 3,
    }
    return PolicyTraining.model_validate({**fields, **changes})


def make_offline_world(folder: Path, tiny: TinyWorld) -> OfflineWorld:
    rng = random.Random(11)
    rows = [
        {"prompt": f"hello {rng.choice(WORDS)}", "response": " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))}
        for _ in range(120)
    ]
    tokenizer = build_tokenizer()
    build_model(tokenizer, width=24, layers=1, seed=9, initializer_range=0.15).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    demonstrations = write_rows(folder / "demonstrations.jsonl", rows)
    return OfflineWorld(make_policy_world(folder, tiny), tiny.preferences, demonstrations, folder / "teacher")
