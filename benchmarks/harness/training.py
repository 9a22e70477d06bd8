"""Attempts as the operator would start them, and the desk's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_trainer.config import Checkpoints
from rlhf_trainer.wire import AttemptConfig, Located, Result
from tests.trainer.training_world import free_port

RANKS = 2


def attempt(output: Path, name: str, ranks: int) -> dict[str, Any]:
    """The fields that every first attempt has."""
    return {
        "namespace": "benchmark",
        "name": name,
        "uid": name,
        "attempt": 1,
        "world_size": ranks,
        "config_digest": "sha256:" + "0" * 64,
        "output": Located(path=str(output)),
        "checkpoints": Checkpoints(every_steps=100_000, keep_last=1),
    }


def train(folder: Path, name: str, fields: dict[str, Any]) -> Result:
    """One attempt of two ranks under the launcher, as in a pod; a failed gate is an outcome, anything else an error."""
    output = folder / name
    config = AttemptConfig(**attempt(output, name, RANKS), **fields)
    path = folder / f"{name}.json"
    path.write_text(config.to_json())
    environment = {
        "RLHF_ATTEMPT_CONFIG": str(path),
        "RLHF_TERMINATION_LOG": str(folder / f"{name}.end"),
        "RLHF_STATUS_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_NPROC_PER_NODE": str(RANKS),
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(free_port()),
    }
    subprocess.run([sys.executable, "-m", "rlhf_trainer.launch"], env={**os.environ, **environment}, check=False)
    result = Result.model_validate_json((output / "a1" / "result.json").read_bytes())
    assert result.artifact is not None, result.message
    return result


def python(module: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
