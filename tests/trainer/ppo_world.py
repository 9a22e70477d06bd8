"""The smallest world a policy can be optimised in: a random policy, a random reward model, a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlhf_trainer.config import Checkpoints, Evaluation, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.loops.rollout import Experience
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, save_reward_model
from rlhf_trainer.wire import AttemptConfig, Located, digest_of
from tests.trainer.training_world import TinyWorld, write_rows


@dataclass(frozen=True)
class PolicyWorld:
    base: Path
    reward_model: Path
    audit: Path
    prompts: Path

    def config(self, output: Path, world_size: int = 1, **changes: Any) -> AttemptConfig:
        """A policy attempt of a few steps; ``changes`` replace fields."""
        training = changes.pop("training", training_of())
        fields: dict[str, Any] = {
            "kind": "PolicyOptimizationJob",
            "namespace": "default",
            "name": "tiny",
            "uid": "0000-tiny",
            "attempt": 1,
            "world_size": world_size,
            "config_digest": digest_of(training.model_dump(mode="json")),
            "output": Located(path=str(output)),
            "checkpoints": Checkpoints(every_steps=2, keep_last=3),
            "policy": Located(path=str(self.base)),
            "reward_model": Located(path=str(self.reward_model)),
            "audit_reward_model": Located(path=str(self.audit)),
            "prompts": Located(path=str(self.prompts)),
            "policy_training": training,
            "evaluation": Evaluation(min_win_rate=0.0, samples=16),
            "no_progress_seconds": 600,
            "rendezvous_seconds": 600,
        }
        return AttemptConfig(**{**fields, **changes})


def training_of(**changes: Any) -> PolicyTraining:
    fields = {
        "steps": 3,
        "prompts_per_step": 8,
        "learning_rate": 0.01,
        "generation": {"max_new_tokens": 6},
        "ppo": {"epochs": 2, "mini_batches": 2},
        "kl": {"horizon": 50, "target": 0.5},
        "deepspeed": {"zero_stage": 2},
        "seed": 3,
    }
    return PolicyTraining.model_validate({**fields, **changes})


def make_policy_world(folder: Path, tiny: TinyWorld) -> PolicyWorld:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny.base))
    for name, seed in (("reward", 1), ("audit", 2)):
        ensemble = RewardEnsemble.from_base(tiny.base, 2, encoder.pad_id, seed)
        target = folder / name
        target.mkdir()
        save_reward_model(target, ensemble, ensemble.state_dict(), encoder, RewardCalibration(1.0, (0.0, 0.0), 0.1))
    rows = [{"prompt": prompt.text} for prompt in every_prompt()[::37]]
    return PolicyWorld(tiny.base, folder / "reward", folder / "audit", write_rows(folder / "prompts.jsonl", rows))


def experience_of(responses: Sequence[Sequence[int]], scores: Sequence[float], **given: Any) -> Experience:
    """Experience without a model: replies to one prompt and their scores; tensors (B, T) may be given, else 0."""
    width = max(len(response) for response in responses)
    tokens, rows = torch.zeros(len(responses), width), torch.zeros(len(responses))
    fields: dict[str, Any] = {
        "prompts": ((3, 1),) * len(responses),
        "responses": tuple(tuple(response) for response in responses),
        "finished": torch.ones(len(responses), dtype=torch.bool),
        "scores": torch.tensor(scores),
        "spreads": rows,
        "violations": rows,
        **dict.fromkeys(("logprobs", "sampled", "reference", "values", "entropies"), tokens),
        "sampler_gap": 0.0,
        "generate_seconds": 0.0,
        "score_seconds": 0.0,
    }
    return Experience(**{**fields, **given})
