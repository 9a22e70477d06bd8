"""Step time of PPO and of the reward model at ZeRO 0, 2 and 3 on two CPU ranks, split by generate, score and train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

from benchmarks.harness.training import attempt
from benchmarks.report import Report
from rlhf_trainer.config import Evaluation, PolicyTraining, RewardModelTraining, RewardModelValidation
from rlhf_trainer.desk.world import Sizes, generate
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer.training_world import free_port

RANKS, STAGES = 2, (0, 2, 3)
WARM_UP, TIMED = 5, 20
SIZES = Sizes(pairs=1500, prompts=400, scores=40, safety=20, pretrain_steps=30, tune_steps=20, leaky_steps=1)

# Runs one attempt per configuration in the same processes and keeps every step's figures.
SCRIPT = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.loops.common import Session, StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
steps = []
plain = StatusBoard.step
def recorded(board, step, metrics, guardrails):
    steps.append(dict(metrics))
    plain(board, step, metrics, guardrails)
StatusBoard.step = recorded
os.environ["RLHF_STATUS_PORT"] = "0"
world = join(timedelta(seconds=300))
for path in sys.argv[1:]:
    steps.clear()
    config = AttemptConfig.model_validate_json(Path(path).read_bytes())
    result = run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), StopSignal())
    assert result.artifact is not None, result.message
    if world.is_main:
        Path(path).with_suffix(".steps").write_text(json.dumps(steps))
leave()
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="trainer-steps-") as temporary:
        folder = Path(temporary)
        generate(folder / "world", 0, SIZES)
        rewards = {stage: reward_config(folder, stage) for stage in STAGES}
        reward_steps = {stage: timed(folder, f"reward-{stage}", config) for stage, config in rewards.items()}
        policies = {stage: policy_config(folder, stage) for stage in STAGES}
        policy_steps = {stage: timed(folder, f"policy-{stage}", config) for stage, config in policies.items()}
    report = Report("trainer_steps", "Training step time, service desk, two CPU ranks", ("torch", "deepspeed"))
    for stage, steps in reward_steps.items():
        add(report, f"reward model (3 members, 64 pairs), ZeRO {stage}: step", steps, "stepSeconds")
    for stage, steps in policy_steps.items():
        for part, key in (("step", "stepSeconds"), ("generate", "generateSeconds"), ("score", "scoreSeconds")):
            add(report, f"PPO (64 prompts, 2 x 2 mini batches), ZeRO {stage}: {part}", steps, key)
        add(report, f"PPO (64 prompts, 2 x 2 mini batches), ZeRO {stage}: train", steps, "trainSeconds")
    load = os.getloadavg()[0]
    report.note(
        f"A model of 60,000 weights: what is measured is the overhead of the loop and of gloo. {WARM_UP} steps of "
        f"warm-up, one thread per rank; the machine's load average was {load:.1f} at the end."
    )
    report.write()
    return 0


def reward_config(folder: Path, stage: int) -> AttemptConfig:
    training = RewardModelTraining(epochs=2, deepspeed={"zero_stage": stage})
    return AttemptConfig(
        **attempt(folder / f"reward-{stage}", f"reward-{stage}", RANKS),
        kind="RewardModelJob",
        base_model=Located(path=str(folder / "world/models/desk-sft")),
        preferences=Located(path=str(folder / "world/feedback/careful.jsonl")),
        reward_model_training=training,
        validation=RewardModelValidation(),
    )


def policy_config(folder: Path, stage: int) -> AttemptConfig:
    return AttemptConfig(
        **attempt(folder / f"policy-{stage}", f"policy-{stage}", RANKS),
        kind="PolicyOptimizationJob",
        policy=Located(path=str(folder / "world/models/desk-sft")),
        reward_model=Located(path=str(folder / "reward-0/a1/artifact")),
        prompts=Located(path=str(folder / "world/feedback/prompts.jsonl")),
        policy_training=PolicyTraining(steps=WARM_UP + TIMED, deepspeed={"zero_stage": stage}),
        evaluation=Evaluation(min_win_rate=0.0, samples=16),
    )


def timed(folder: Path, name: str, config: AttemptConfig) -> list[dict[str, float]]:
    """Every step's figures after the warm-up."""
    script, path = folder / "run.py", folder / f"{name}.json"
    script.write_text(SCRIPT)
    path.write_text(config.to_json())
    ranks = folder / f"{name}-ranks"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(script), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RLHF_RANKS_FOLDER": str(ranks)}
    subprocess.run(command, env=environment, check=True)
    steps: list[dict[str, float]] = json.loads(path.with_suffix(".steps").read_text())
    return steps[WARM_UP : WARM_UP + TIMED]


def add(report: Report, name: str, steps: list[dict[str, float]], key: str) -> None:
    values = [1000 * step[key] for step in steps]
    low, _, high = quantiles(values, n=4)
    report.add(name, median(values), "ms", samples=len(values), spread=f"IQR {low:.0f} to {high:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
