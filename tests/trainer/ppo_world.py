"""The smallest world a policy can be optimised in: a random policy, a random reward model, a few prompts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf_trainer.config import Checkpoints, Evaluation, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.loops.rollout import Experience
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, save_reward_model
from rlhf_trainer.safety.scorer import LinearFilter
from rlhf_trainer.wire import AttemptConfig, Located, digest_of
from tests.trainer.training_world import TinyWorld, run_ranks, write_rows

# Runs the attempts it is given one after the other in the same processes: starting DeepSpeed costs more than training.
# ``path@3`` gets its SIGTERM in step 3.
SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
os.environ["RLHF_STATUS_PORT"] = "0"
plain = StatusBoard.step
world = join(timedelta(seconds=600))
for argument in sys.argv[1:]:
    path, _, last = argument.partition("@")
    stop = StopSignal()
    def step(board, done, *rest):
        plain(board, done, *rest)
        stop.received = stop.received or str(done) == last
    StatusBoard.step = step
    config = AttemptConfig.model_validate_json(Path(path).read_bytes())
    result = run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), stop)
    if world.is_main:
        Path(path).with_suffix(".result").write_text(result.to_json())
leave()
"""

# A filter that finds a violation in every reply fails any gate; its verdict is another test's matter.
NO_GATE = Evaluation(min_win_rate=0.0, max_violation_rate=1.0, samples=16)


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


def strict_filter(path: Path) -> Path:
    """A filter that finds a violation in every reply."""
    path.write_text(LinearFilter(np.zeros(16, dtype=np.float32), bias=1.0, threshold=0.0).to_json())
    return path


def word_filter(path: Path, *words: str) -> Path:
    """A filter that trips on words that begin as these do, up to the fourth letter."""
    weights = np.zeros(4096, dtype=np.float32)
    for word in words:
        weights[zlib.crc32(f" {word} "[:5].encode()) % 4096] = 10.0
    path.write_text(LinearFilter(weights, bias=-1.0, threshold=0.0).to_json())
    return path


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


def run_attempts(
    folder: Path, ranks: int, configs: Mapping[str, AttemptConfig], stop_after: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """name → result document of each attempt, in the order given; some are told to stop after a step."""
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in configs}
    for name, config in configs.items():
        paths[name].write_text(config.to_json())
    stops = stop_after or {}
    arguments = [f"{path}@{stops[name]}" if name in stops else str(path) for name, path in paths.items()]
    done = run_ranks(SCRIPT, ranks, folder, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads(path.with_suffix(".result").read_bytes()) for name, path in paths.items()}


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["artifact"]["path"]) / "model.safetensors")


def history(config: AttemptConfig) -> list[dict[str, float]]:
    """What each step of an attempt reported, but for wall times."""
    path = Path(config.output.path) / f"a{config.attempt}" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    timed = ("Seconds", "samplesPerSecond")
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in rows]
