"""Whole attempts as the worker runs them, without a launcher: starting one costs more than these attempts."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

from rlhf_trainer.distributed import join
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig, Result
from rlhf_trainer.worker import load_loop, run_attempt
from tests.trainer.training_world import run_ranks


def run_here(config: AttemptConfig) -> Result:
    """One rank, no launcher; the result is what the launcher would have read."""
    world = join(timedelta(seconds=60))
    with tempfile.TemporaryDirectory() as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_STATUS_PORT", "0")
        return run_attempt(config, load_loop(config.kind), world, RankFiles(Path(ranks), 0), StopSignal())


_SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
os.environ["RLHF_STATUS_PORT"] = "0"
world = join(timedelta(seconds=600))
config = AttemptConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
result = run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), StopSignal())
if world.is_main:
    Path(sys.argv[1]).with_suffix(".result").write_text(result.to_json())
leave()
"""


def run_on(ranks: int, folder: Path, config: AttemptConfig) -> Result:
    """Several ranks under torchrun; the result is rank 0's."""
    folder.mkdir(exist_ok=True)
    path = folder / "attempt.json"
    path.write_text(config.to_json())
    done = run_ranks(_SCRIPT, ranks, folder, str(path))
    assert done.returncode == 0, done.stderr[-4000:]
    return Result.model_validate_json(path.with_suffix(".result").read_bytes())
