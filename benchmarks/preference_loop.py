"""Does it pay to ask people about the policy's own replies? Online against offline preference learning, same labels.

Offline: every label is about replies of the base policy, the reward model is trained once and frozen, then PPO. Online:
a third of the labels as before, then two rounds of collecting pairs from the newest policy, asking the same panel and
training the reward model anew on everything. The hidden oracle judges both. Everything runs as a pod would run it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.harness.training import python, train
from benchmarks.policy_quality import policy_fields, reward_fields
from benchmarks.report import Report
from rlhf_trainer.config import RewardModelTraining
from rlhf_trainer.wire import Located

ROUNDS, LABELS = 3, 400  # of each round
REWARD = RewardModelTraining(epochs=4, learning_rate=0.002, global_batch_size=32, seed=7)


@dataclass(frozen=True)
class Judged:
    win_rate: float
    utility: float
    correlation: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    online, offline = [], []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix=f"preference-loop-{seed}-") as name:
            folder = Path(name)
            world = folder / "world"
            python("rlhf_trainer.desk", "generate", "--out", str(world), "--seed", str(seed))
            online.append(play_online(folder, world, seed))
            offline.append(play_offline(folder, world))
            print(seed, "online", *online[-1], "offline", offline[-1], sep="\n  ", flush=True)
    write(online, offline)
    return 0


def play_offline(folder: Path, world: Path) -> Judged:
    labels = (world / "feedback/careful.jsonl").read_text().splitlines()[: ROUNDS * LABELS]
    return play_round(folder, world, "offline", labels)[0]


def play_online(folder: Path, world: Path, seed: int) -> list[Judged]:
    """One outcome per round; the policy always starts from the base, the labels grow."""
    labels = (world / "feedback/careful.jsonl").read_text().splitlines()[:LABELS]
    judged = []
    for number in range(ROUNDS):
        outcome, policy, reward_model = play_round(folder, world, f"online-{number}", labels)
        judged.append(outcome)
        if number < ROUNDS - 1:
            labels += collect(folder, world, policy, reward_model, seed * 100 + number)
    return judged


def play_round(folder: Path, world: Path, name: str, labels: list[str]) -> tuple[Judged, str, str]:
    """Reward model on the labels, PPO against it, the oracle's judgement; the artifacts' paths."""
    path = folder / f"{name}-labels.jsonl"
    path.write_text("".join(line + "\n" for line in labels))
    fields = {**reward_fields(world, "careful"), "preferences": Located(path=str(path))}
    reward = train(folder, f"{name}-reward", {**fields, "reward_model_training": REWARD})
    assert reward.artifact is not None
    policy = train(folder, f"{name}-policy", policy_fields(world, reward.artifact.path))
    assert policy.artifact is not None
    base = str(world / "models/desk-sft")
    arguments = ("judge", "--policy", policy.artifact.path, "--against", base, "--samples", "1000")
    oracle = json.loads(python("rlhf_trainer.desk", *arguments))
    judged = Judged(oracle["win_rate"], oracle["utility"], reward.metrics["humanCorrelation"])
    return judged, policy.artifact.path, reward.artifact.path


def collect(folder: Path, world: Path, policy: str, reward_model: str, seed: int) -> list[str]:
    """New annotations of the policy's own replies."""
    pairs, answers = folder / f"pairs-{seed}.jsonl", folder / f"answers-{seed}.jsonl"
    prompts = world / "feedback/prompts.jsonl"
    python(
        "rlhf_trainer.collect",
        *("--policy", policy, "--reward-model", reward_model, "--prompts", str(prompts)),
        *("--pairs", str(LABELS), "--seed", str(seed), "--out", str(pairs)),
    )
    python("rlhf_trainer.desk", "annotate", "--pairs", str(pairs), "--out", str(answers), "--name", f"round-{seed}")
    return answers.read_text().splitlines()


def write(online: list[list[Judged]], offline: list[Judged]) -> None:
    report = Report("preference_loop", "Online preference loop against offline", ("torch", "transformers", "deepspeed"))

    def add(name: str, values: list[float]) -> None:
        report.add(name, mean(values), "1", samples=len(values), spread=f"{min(values):.3f} to {max(values):.3f}")

    for number in range(ROUNDS):
        rounds = [each[number] for each in online]
        add(f"online, {(number + 1) * LABELS} labels: oracle's utility", [one.utility for one in rounds])
        add(f"online, {(number + 1) * LABELS} labels: win rate against base", [one.win_rate for one in rounds])
    add(f"offline, {ROUNDS * LABELS} labels: oracle's utility", [one.utility for one in offline])
    add(f"offline, {ROUNDS * LABELS} labels: win rate against base", [one.win_rate for one in offline])
    gain = [rounds[-1].utility - frozen.utility for rounds, frozen in zip(online, offline, strict=True)]
    add("online minus offline, same number of labels: oracle's utility", gain)
    report.note("Each seed is one sample: its own base model, raters, data, reward models and policies.")
    report.note(f"The machine's load average was {os.getloadavg()[0]:.1f} at the end.")
    report.write()


if __name__ == "__main__":
    sys.exit(main())
