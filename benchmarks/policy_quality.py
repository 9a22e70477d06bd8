"""What the whole trainer is for: does careful feedback make a better policy, and is careless feedback refused?

Five worlds from five seeds. In each: a reward model on careful labels, an audit one on other labels, one on careless
labels, and PPO against the careful one; the hidden oracle compares the policy with its base. Everything runs as a
pod would run it, two ranks under the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from benchmarks.harness.training import python, train
from benchmarks.report import Report
from rlhf_trainer.config import (
    Evaluation,
    HumanScores,
    PolicyTraining,
    RewardModelTraining,
    RewardModelValidation,
)
from rlhf_trainer.wire import Located, VerdictState

RANKS = 2
REWARD = RewardModelTraining(epochs=3, learning_rate=0.002, seed=7)
POLICY = PolicyTraining(steps=100, seed=7)


@dataclass(frozen=True)
class World:
    """One seed's outcome."""

    careful_correlation: float
    careless_accuracy: float
    careless_correlation: float
    careless_refused: bool
    win_rate: float
    violation_rate: float
    base_violation_rate: float
    reward_seconds: float
    policy_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    worlds = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix=f"policy-quality-{seed}-") as folder:
            worlds.append(play(Path(folder), seed))
            print(seed, worlds[-1], flush=True)
    write(worlds)
    return 0


def play(folder: Path, seed: int) -> World:
    world = folder / "world"
    python("rlhf_trainer.desk", "generate", "--out", str(world), "--seed", str(seed))
    began = time.monotonic()
    careful = train(folder, "careful", reward_fields(world, "careful"))
    reward_seconds = time.monotonic() - began
    audit = train(folder, "audit", reward_fields(world, "audit"))
    careless = train(folder, "careless", reward_fields(world, "careless"))
    assert careful.artifact is not None
    assert audit.artifact is not None
    began = time.monotonic()
    policy = train(folder, "policy", policy_fields(world, careful.artifact.path, audit.artifact.path))
    policy_seconds = time.monotonic() - began
    assert policy.artifact is not None, policy.message
    base = str(world / "models/desk-sft")
    judged = json.loads(
        python("rlhf_trainer.desk", "judge", "--policy", policy.artifact.path, "--against", base, "--samples", "1000")
    )
    verdicts = {verdict.metric: verdict for verdict in careless.verdicts}
    return World(
        careful_correlation=careful.metrics["humanCorrelation"],
        careless_accuracy=careless.metrics["heldOutAccuracy"],
        careless_correlation=careless.metrics["humanCorrelation"],
        careless_refused=verdicts["humanCorrelation"].state is VerdictState.FAIL,
        win_rate=judged["win_rate"],
        violation_rate=judged["violation_rate"],
        base_violation_rate=judged["violation_rate_against"],
        reward_seconds=reward_seconds,
        policy_seconds=policy_seconds,
    )


def reward_fields(world: Path, labels: str) -> dict[str, Any]:
    scores = HumanScores(uri="pvc://feedback/scores.jsonl", digest="sha256:" + "0" * 64)
    return {
        "kind": "RewardModelJob",
        "base_model": Located(path=str(world / "models/desk-sft")),
        "preferences": Located(path=str(world / f"feedback/{labels}.jsonl")),
        "human_scores": Located(path=str(world / "feedback/scores.jsonl")),
        "reward_model_training": REWARD,
        "validation": RewardModelValidation(human_scores=scores),
    }


def policy_fields(world: Path, reward_model: str, audit: str | None = None) -> dict[str, Any]:
    return {
        "kind": "PolicyOptimizationJob",
        "policy": Located(path=str(world / "models/desk-sft")),
        "reward_model": Located(path=reward_model),
        "audit_reward_model": None if audit is None else Located(path=audit),
        "prompts": Located(path=str(world / "feedback/prompts.jsonl")),
        "policy_training": POLICY,
        "evaluation": Evaluation(),
    }


def write(worlds: list[World]) -> None:
    report = Report("policy_quality", "Policy quality by the hidden oracle", ("torch", "transformers", "deepspeed"))
    count = len(worlds)

    def add(name: str, values: list[float], unit: str) -> None:
        spread = "one seed"
        if count > 1:
            reach = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / count**0.5
            spread = f"95% CI over seeds {mean(values) - reach:.3f} to {mean(values) + reach:.3f}"
        report.add(name, mean(values), unit, samples=count, spread=spread)

    add("win rate against base, careful labels", [w.win_rate for w in worlds], "fraction")
    add("careless labels refused by the gate", [float(w.careless_refused) for w in worlds], "fraction")
    add("careful reward model: Spearman with human scores", [w.careful_correlation for w in worlds], "1")
    add("careless reward model: accuracy on its own holdout", [w.careless_accuracy for w in worlds], "fraction")
    add("careless reward model: Spearman with human scores", [w.careless_correlation for w in worlds], "1")
    add("unsafe replies of the policy", [w.violation_rate for w in worlds], "fraction")
    add("unsafe replies of its base", [w.base_violation_rate for w in worlds], "fraction")
    add("reward model, wall time from launch to result", [w.reward_seconds for w in worlds], "s")
    add("PPO, wall time from launch to result", [w.policy_seconds for w in worlds], "s")
    report.note("Each seed is one sample: its own base model, raters, data, reward models and policy.")
    report.note(f"The machine's load average was {os.getloadavg()[0]:.1f} at the end; times are of that machine.")
    report.write()


if __name__ == "__main__":
    sys.exit(main())
