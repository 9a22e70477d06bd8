"""SIGKILL at a random moment of every algorithm: the next attempt ends in what an undisturbed run ends in.

Losses, every other figure of every remaining step, and the bytes of the artifact. Nothing of the killed process is
told of its end: it dies in the middle of a step, a save or a write, wherever the moment finds it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.config import Checkpoints
from rlhf_trainer.wire import AttemptConfig, FailureClass
from tests.trainer.algorithms import LENGTH, SAFETY
from tests.trainer.every_algorithm import LORA, REWARD_MODEL, EveryAlgorithm, staged
from tests.trainer.ppo_world import history
from tests.trainer.training_world import TinyWorld

STEPS = 8
EVERY = Checkpoints(every_steps=2, keep_last=2)


# Every algorithm with the options that make its state richest, the stages shared out; adapters, constraints and
# bfloat16 besides.
CASES = {
    "reward-model-1": staged(REWARD_MODEL, 1),
    "reward-model-lora-3": staged(REWARD_MODEL, 3, **LORA),
    "ppo-2": staged("ppo", 2),
    "ppo-constrained-3": staged("ppo", 3, constraints=[LENGTH, SAFETY], ppo={"critic": "shared"}),
    "grpo-lora-3": staged("grpo", 3, **LORA),
    "rloo-constrained-1": staged("rloo", 1),
    "reinforce-bfloat16-3": staged("reinforce", 3, precision="bfloat16"),
    "best-of-n-0": staged("best-of-n", 0),
    "DPO-3": staged("DPO", 3),
    "KTO-lora-1": staged("KTO", 1, **LORA),
    "SFT-0": staged("SFT", 0),
    "Distillation-2": staged("Distillation", 2),
    "IPO-bfloat16-0": staged("IPO", 0, precision="bfloat16"),
    "sequence-lora-2": staged("sequence", 2, **LORA),
}

# Every attempt is a process of its own, forked from one that has DeepSpeed loaded. The kill is armed in the step that
# was drawn and comes up to a step's time later, from a thread: a busy machine delays it with the rest, and at the end
# of the last step but one it comes at once, so that something is left to train.
SCRIPT = """
import os, signal, sys, threading
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
import deepspeed
os.environ["RLHF_STATUS_PORT"] = "0"
for kind in ("RewardModelJob", "PolicyOptimizationJob"):
    load_loop(kind)

def attempt(path, moment):
    plain = StatusBoard.step
    def step(board, done, *rest):
        plain(board, done, *rest)
        armed, latest, delay = moment.split(":")
        if done == int(latest):
            os.kill(os.getpid(), signal.SIGKILL)
        elif done == int(armed):
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
    if moment:
        StatusBoard.step = step
    config = AttemptConfig.model_validate_json(path.read_bytes())
    world = join(timedelta(seconds=600))
    result = run_attempt(config, load_loop(config.kind), world, RankFiles(path.parent, 0), StopSignal())
    path.with_suffix(".result").write_text(result.to_json())
    os._exit(0)

for argument in sys.argv[1:]:
    path, _, moment = argument.partition("@")
    child = os.fork()
    if child == 0:
        try:
            attempt(Path(path), moment)
        finally:
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    expected = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL if moment else status == 0
    assert expected, f"{argument}: wait status {status}"
"""

Configure = Callable[[Path, int], AttemptConfig]


@dataclass(frozen=True)
class Killed:
    """An undisturbed run, one that was killed ``delay`` seconds after ``step`` was done, and the attempt after that."""

    step: int
    delay: float
    whole: AttemptConfig
    killed: AttemptConfig
    resumed: AttemptConfig
    folder: Path

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint that was complete for certain: that of ``step`` may have been under way."""
        return (self.step - 1) // EVERY.every_steps * EVERY.every_steps

    def path(self, attempt: str) -> Path:
        return self.folder / attempt / "attempt.json"

    def result(self, attempt: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path(attempt).with_suffix(".result").read_bytes())
        return found


def configure(every: EveryAlgorithm, case: str) -> Configure:
    """Output folder and attempt number → the attempt."""
    algorithm, changes = CASES[case]
    fixed = {"epochs": 1, "global_batch_size": 32} if algorithm == REWARD_MODEL else {"steps": STEPS}
    return lambda output, attempt: every.attempt(
        algorithm, output, 1, {**fixed, **changes}, attempt=attempt, checkpoints=EVERY
    )


def plan(every: EveryAlgorithm, case: str, folder: Path) -> Killed:
    folder.mkdir()
    config = configure(every, case)
    drawn = random.SystemRandom()
    run = Killed(
        step=drawn.randint(EVERY.every_steps + 1, STEPS - 2),
        delay=drawn.uniform(0.0, 0.05),
        whole=config(folder / "undisturbed", 1),
        killed=config(folder / "disturbed", 1),
        resumed=config(folder / "disturbed", 2),
        folder=folder,
    )
    for label, attempt in (("whole", run.whole), ("killed", run.killed), ("resumed", run.resumed)):
        run.path(label).parent.mkdir()
        run.path(label).write_text(attempt.to_json())
    return run


@pytest.fixture(scope="module")
def runs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    folder = tmp_path_factory.mktemp("killed")
    every = EveryAlgorithm(folder / "world", tiny_world)
    runs = {case: plan(every, case, folder / case) for case in CASES}
    arguments = []
    for run in runs.values():
        killed = f"{run.path('killed')}@{run.step}:{STEPS - 1}:{run.delay}"
        arguments += [str(run.path("whole")), killed, str(run.path("resumed"))]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_an_undisturbed_one(runs: dict[str, Killed], case: str) -> None:
    run = runs[case]
    whole, resumed = run.result("whole"), run.result("resumed")
    assert whole["failureClass"] == resumed["failureClass"] == FailureClass.SUCCESS, (whole, resumed)
    assert "resumedFrom" in resumed, f"killed {run.delay:.4f} s after step {run.step}, and nothing was resumed"
    start = resumed["resumedFrom"]["step"]
    assert run.saved <= start < STEPS, f"killed {run.delay:.4f} s after step {run.step}, resumed from {start}"
    steps = history(run.whole)
    assert history(run.resumed) == steps[start:]
    assert resumed["artifact"]["digest"] == whole["artifact"]["digest"]
