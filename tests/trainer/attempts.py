"""Whole attempts in the test's own process, as the worker would run them: starting a launcher costs more than they."""

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


def run_here(config: AttemptConfig) -> Result:
    """One rank, no launcher; the result is what the launcher would have read."""
    world = join(timedelta(seconds=60))
    with tempfile.TemporaryDirectory() as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_STATUS_PORT", "0")
        return run_attempt(config, load_loop(config.kind), world, RankFiles(Path(ranks), 0), StopSignal())
