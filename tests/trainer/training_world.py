"""What the trainer tests train on and with: a tiny world with a known reward, configurations, real launches."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_trainer.config import Checkpoints, RewardModelTraining, RewardModelValidation
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.desk.vocabulary import TOPICS, VALENCE
from rlhf_trainer.digests import dataset_digest, folder_digest
from rlhf_trainer.ranks import FOLDER_VARIABLE, RankState, read_states
from rlhf_trainer.wire import AttemptConfig, Located, Result, digest_of

ROOT = Path(__file__).resolve().parents[2]
WORDS = tuple(VALENCE)
LAUNCH_SECONDS = 900.0  # on a crowded machine; tests wait for conditions, not for this


def true_reward(response: str) -> float:
    """The reward that labels follow: twice the mean feeling of the words."""
    words = response.split()
    return 2.0 * sum(VALENCE[word] for word in words) / len(words)


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Bradley-Terry labels of ``true_reward``: as noisy as their log-odds say."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        a, b = (" ".join(rng.choices(WORDS, k=rng.randint(3, 6))) for _ in range(2))
        wins = rng.random() < 1 / (1 + math.exp(-(true_reward(a) - true_reward(b))))
        rows.append(
            {
                "prompt": f"hello {rng.choice(TOPICS)} {rng.choice(TOPICS)}",
                "response_a": a,
                "response_b": b if b != a else b + " glad",
                "preference": "a" if wins else "b",
                "rater_id": f"r{index % 3}",
                "is_gold": False,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class TinyWorld:
    base: Path
    preferences: Path
    scores: Path

    def config(self, output: Path, world_size: int = 1, **changes: Any) -> AttemptConfig:
        """A reward-model attempt of a few steps; ``changes`` replace fields."""
        training = changes.pop("training", training_of())
        fields: dict[str, Any] = {
            "kind": "RewardModelJob",
            "namespace": "default",
            "name": "tiny",
            "uid": "0000-tiny",
            "attempt": 1,
            "world_size": world_size,
            "config_digest": digest_of(training.model_dump(mode="json")),
            "output": Located(path=str(output)),
            "checkpoints": Checkpoints(every_steps=2, keep_last=3),
            "base_model": Located(path=str(self.base), digest=folder_digest(self.base)),
            "preferences": Located(path=str(self.preferences), digest=dataset_digest(self.preferences)),
            "reward_model_training": training,
            "validation": RewardModelValidation(min_accuracy=0.0, max_calibration_error=1.0),
            "no_progress_seconds": 600,
            "rendezvous_seconds": 600,
        }
        return AttemptConfig(**{**fields, **changes})


def training_of(**changes: Any) -> RewardModelTraining:
    fields = {
        "epochs": 1,
        "holdout_fraction": 0.35,
        "global_batch_size": 16,
        "max_length": 16,
        "learning_rate": 0.01,
        "ensemble": {"members": 2},
        "deepspeed": {"zero_stage": 2},
        "seed": 3,
    }
    return RewardModelTraining.model_validate({**fields, **changes})


def make_tiny_world(folder: Path) -> TinyWorld:
    tokenizer = build_tokenizer()
    build_model(tokenizer, width=16, layers=1, seed=1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(5)
    responses = [" ".join(rng.choices(WORDS, k=4)) for _ in range(40)]
    asked = [f"hello {rng.choice(TOPICS)} {rng.choice(TOPICS)}" for _ in responses]  # one prompt says nothing of others
    scores = [
        {"prompt": prompt, "response": text, "score": true_reward(text)}
        for prompt, text in zip(asked, responses, strict=True)
    ]
    return TinyWorld(
        base=folder / "base",
        preferences=write_rows(folder / "preferences.jsonl", preference_rows(400, seed=1)),
        scores=write_rows(folder / "scores.jsonl", scores),
    )


@dataclass
class Launch:
    """One ``python -m rlhf_trainer.launch`` as a pod would start it, in a folder of its own."""

    config: AttemptConfig
    folder: Path
    nodes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    status_port: int = field(default_factory=lambda: free_port())

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "attempt.json").write_text(self.config.to_json())
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_trainer.launch"],
            env={**os.environ, **self._environment()},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _environment(self) -> dict[str, str]:
        return {
            "RLHF_ATTEMPT_CONFIG": str(self.folder / "attempt.json"),
            "RLHF_TERMINATION_LOG": str(self.folder / "termination-log"),
            "RLHF_STATUS_PORT": str(self.status_port),
            "TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PET_NNODES": str(self.nodes),
            "PET_NODE_RANK": "0",
            "PET_NPROC_PER_NODE": str(self.config.world_size // self.nodes),
            "PET_MASTER_ADDR": "localhost",
            "PET_MASTER_PORT": str(free_port()),
            **self.environment,
        }

    def wait(self) -> int:
        try:
            return self.process.wait(LAUNCH_SECONDS)
        finally:
            self.end()

    def end(self) -> None:
        """Ends what is left; the launcher ends its ranks on SIGTERM."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(LAUNCH_SECONDS)
        self._log.close()

    def ranks(self) -> dict[int, RankState]:
        folders = list(self.folder.glob("rlhf-ranks-*"))
        return read_states(folders[0]) if folders else {}

    def freeze(self, rank: int) -> None:
        """Stops a rank in whatever it does, as if long ago: its last heartbeat is made older than the limit."""
        os.kill(self.ranks()[rank].pid, signal.SIGSTOP)
        (beat,) = self.folder.glob(f"rlhf-ranks-*/rank-{rank}.beat")
        self.until(lambda: process_state(self.ranks()[rank].pid) == "T", f"the stop of rank {rank}")
        long_ago = time.time() - 2 * self.config.no_progress_seconds
        os.utime(beat, (long_ago, long_ago))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LAUNCH_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come about:\n{self.output()}")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Waits until a checkpoint of ``step`` or later is published by this attempt."""
        folder = Path(self.config.output.path) / f"a{self.config.attempt}" / "checkpoints"
        self.until(
            lambda: any(int(path.name.removeprefix("step-")) >= step for path in folder.glob("step-*")),
            f"checkpoint of step {step}",
        )

    def message(self) -> Result:
        return Result.model_validate_json((self.folder / "termination-log").read_bytes())

    def output(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-6000:]


@contextmanager
def launched(config: AttemptConfig, folder: Path, **options: Any) -> Iterator[Launch]:
    """A launch that is over, however the test ends."""
    launch = Launch(config, folder, **options)
    try:
        yield launch
    finally:
        launch.end()


def run_ranks(script: str, ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A test's own script under torchrun, as the worker would be."""
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), FOLDER_VARIABLE: str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)


def process_state(pid: int) -> str:
    """The letter of proc(5): R, S, D, Z, T (stopped) …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
