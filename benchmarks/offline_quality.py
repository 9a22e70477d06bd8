"""Do algorithms that learn from given texts make better policies, by the hidden oracle?

Worlds from several seeds. In each: DPO and KTO from careful labels against their base; SFT on the desk's careful
replies against the same base; and a student of an eighth of the size distilled from the DPO policy, against that
teacher. Everything runs as a pod would run it, two ranks under the launcher; no gate and no reward model is involved.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats
from transformers import AutoTokenizer

from benchmarks.harness.training import python, train
from benchmarks.report import Report
from rlhf_trainer.config import Evaluation, PolicyTraining
from rlhf_trainer.desk.datasets import write_rows
from rlhf_trainer.desk.grammar import careful_reply
from rlhf_trainer.desk.model import build_model, fit
from rlhf_trainer.desk.policies import base_example
from rlhf_trainer.desk.prompts import draw_prompts
from rlhf_trainer.wire import Located

SAMPLES = 2000  # oracle judgements per comparison
NON_INFERIOR = 0.45  # of a student: what the lower bound of its win rate against the teacher should reach
COMMON: dict[str, Any] = {"prompts_per_step": 64, "seed": 7}
SETTINGS: dict[str, dict[str, Any]] = {
    "DPO": {"algorithm": "DPO", "steps": 200, "learning_rate": 0.001, "dpo": {"beta": 0.3}},
    "KTO": {"algorithm": "KTO", "steps": 200, "learning_rate": 0.001, "kto": {"beta": 0.3}},
    "SFT": {"algorithm": "SFT", "steps": 150, "learning_rate": 0.002},
    "sequence": {
        "algorithm": "Distillation", "steps": 400, "learning_rate": 0.01, "distillation": {"mode": "sequence"},
    },
    "onPolicy": {"algorithm": "Distillation", "steps": 400, "learning_rate": 0.01},
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    worlds = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix=f"offline-quality-{seed}-") as folder:
            worlds.append(play(Path(folder), seed))
            print(seed, worlds[-1], flush=True)
    write(worlds)
    return 0


def play(folder: Path, seed: int) -> dict[str, float]:
    """One seed's figures by name."""
    world = folder / "world"
    python("rlhf_trainer.desk", "generate", "--out", str(world), "--seed", str(seed))
    base = world / "models/desk-sft"
    preferences = Located(path=str(world / "feedback/careful.jsonl"))
    write_rows(folder / "careful-replies.jsonl", demonstrations(seed, 1500))
    inputs = {
        "DPO": {"preferences": preferences},
        "KTO": {"preferences": preferences},
        "SFT": {"demonstrations": Located(path=str(folder / "careful-replies.jsonl"))},
    }
    found: dict[str, float] = {}
    policies = {name: optimise(folder, name, base, given, found) for name, given in inputs.items()}
    for name, policy in policies.items():
        found |= judged(f"{name} against its base", policy, base)
    teacher, student = policies["DPO"], small_student(folder / "student", base, seed)
    found |= judged("student before", student, teacher)
    lessons = {"teacher": Located(path=str(teacher)), "prompts": Located(path=str(world / "feedback/prompts.jsonl"))}
    for mode in ("sequence", "onPolicy"):
        found |= judged(mode, optimise(folder, mode, student, lessons, found), teacher)
    return found


def optimise(folder: Path, name: str, policy: Path, given: dict[str, Located], found: dict[str, float]) -> Path:
    began = time.monotonic()
    result = train(
        folder,
        name,
        {
            "kind": "PolicyOptimizationJob",
            "policy": Located(path=str(policy)),
            "policy_training": PolicyTraining.model_validate({**COMMON, **SETTINGS[name]}),
            "evaluation": Evaluation(samples=64),
            **given,
        },
    )
    assert result.artifact is not None
    found[f"seconds of {name}"] = time.monotonic() - began
    return Path(result.artifact.path)


def demonstrations(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed}/demonstrations")
    return [{"prompt": p.text, "response": careful_reply(rng, p)} for p in draw_prompts(rng, count)]


def small_student(folder: Path, base: Path, seed: int) -> Path:
    """About an eighth of the base's parameters, fine-tuned on the desk's mixed everyday answers as the base was."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = build_model(tokenizer, width=16, layers=2, seed=seed, initializer_range=0.15)
    fit(model, tokenizer, base_example, steps=300, rng=random.Random(f"{seed}/student"), learning_rate=6e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judged(name: str, policy: Path, against: Path) -> dict[str, float]:
    """Win rate by the oracle, ties half, with its interval clustered by prompt."""
    arguments = ("--policy", str(policy), "--against", str(against), "--samples", str(SAMPLES))
    verdict = json.loads(python("rlhf_trainer.desk", "judge", *arguments))
    bounds = {f"{name}, {side}": float(verdict[f"win_rate_{side}"]) for side in ("lower", "upper")}
    return {name: float(verdict["win_rate"]), **bounds}


def write(worlds: list[dict[str, float]]) -> None:
    report = Report(
        "offline_quality", "Learning from given texts, by the hidden oracle", ("torch", "transformers", "deepspeed")
    )
    names = {
        "DPO against its base": "win rate of DPO on careful labels against its base",
        "KTO against its base": "win rate of KTO on the same labels",
        "SFT against its base": "win rate of SFT on 1500 careful replies",
        "student before": "win rate of the small student against its teacher (the DPO policy), before",
        "sequence": "after sequence distillation",
        "onPolicy": "after half on-policy distillation, forward KL",
        **{f"seconds of {name}": f"{name}, wall time from launch to result" for name in SETTINGS},
    }
    count = len(worlds)
    for key, name in names.items():
        values = [world[key] for world in worlds]
        spread = "one seed"
        if count > 1:
            reach = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / count**0.5
            spread = f"95% CI over seeds {mean(values) - reach:.3f} to {mean(values) + reach:.3f}"
        elif f"{key}, lower" in worlds[0]:
            lower, upper = (worlds[0][f"{key}, {side}"] for side in ("lower", "upper"))
            spread = f"one seed, 95% CI over prompts {lower:.3f} to {upper:.3f}"
        unit = "s" if key.startswith("seconds") else "fraction"
        report.add(name, mean(values), unit, samples=count, spread=spread)
    bounds = [world["onPolicy, lower"] for world in worlds]
    report.note(f"Each seed is one sample; every comparison is {SAMPLES} oracle judgements, ties half.")
    report.note(
        f"A student is called non-inferior from a lower bound of {NON_INFERIOR}; that of the worst seed is "
        f"{min(bounds):.3f} (on-policy)."
    )
    report.write()


if __name__ == "__main__":
    sys.exit(main())
