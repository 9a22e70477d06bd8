"""One engine, whatever the sharding: equal trajectories at ZeRO 0 to 3 over two processes, micro batches, resume."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.trainer.training_world import run_ranks

SCRIPT = """
import json, math, sys
from datetime import timedelta
from pathlib import Path
import torch
from torch import nn
from rlhf_trainer.config import Precision
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.exits import Diverged

folder, world, report = Path(sys.argv[1]), join(timedelta(seconds=600)), {}

def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

def step(engine, index):
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(index))[world.share(8)]
    rows = rows.to(next(engine.module.parameters()).dtype)
    parts = engine.micro_batches()
    losses = [engine.backward((engine(rows[part]) - rows[part].sum(1, keepdim=True)).square().mean()) for part in parts]
    engine.step(0.05 / (index + 1))
    return sum(losses) / len(losses), engine.gradient_norm, engine.learning_rate

for stage in range(4):
    for micro in (4, 2):
        options = EngineOptions(stage, 0.1, rows_per_step=8, micro_rows=micro, max_grad_norm=1.0)
        engine = Engine(module(), options, world)
        name, path = f"{stage}/{micro}", folder / f"{stage}-{micro}"
        steps = []
        for index in range(5):
            if index == 3 and micro == 4:
                engine.save(path)
            steps.append(step(engine, index))
        report[name] = steps
        weights = engine.state_dict()
        report[name + "/weights"] = {key: value.flatten().tolist() for key, value in weights.items()}
        if micro == 4:
            engine.load(path)
            report[name + "/resumed"] = [step(engine, index) for index in (3, 4)]
        engine.close()
    for precision in (Precision.FLOAT32, Precision.BFLOAT16):
        options = EngineOptions(stage, 0.1, rows_per_step=8, weight_decay=0.5, precision=precision)
        engine = Engine(module(), options, world)
        report[f"{stage}/{precision.value}/norm"] = step(engine, 0)[1]
        report[f"{stage}/{precision.value}"] = {
            key: value.flatten().tolist() for key, value in engine.state_dict().items()
        }
        engine.close()

engine = Engine(module(), EngineOptions(2, 0.1, rows_per_step=8), world)
loss = engine(torch.ones(4, 6)).mean() * (math.nan if world.rank == 1 else 1.0)
try:
    engine.backward(loss)
except Diverged as diverged:
    report["diverged"] = diverged.message
for stage in range(4):
    engine = Engine(module(), EngineOptions(stage, 0.1, rows_per_step=8, max_grad_norm=1.0), world)
    scores = engine(torch.ones(4, 6))
    flat = (scores - scores.detach()).abs()  # 0, and so is its root, whose slope is not
    engine.backward((flat.sqrt() if world.rank == 1 else scores).mean())
    try:
        engine.step()
    except Diverged as diverged:
        report[f"{stage}/steep"] = diverged.message
    report[f"{stage}/kept"] = all(bool(value.isfinite().all()) for value in engine.state_dict().values())
    engine.close()
report["sums"] = world.sums({"a": world.rank + 1.0, "b": 0.5})
report["gathered"] = world.gather(f"rank {world.rank}")
report["any"] = [world.any(world.rank == 1), world.any(False)]
report["broadcast"] = world.broadcast({"from": world.rank})
(folder / f"report-{world.rank}.json").write_text(json.dumps(report))
leave()
"""

NAMES = [f"{stage}/{micro}" for stage in range(4) for micro in (4, 2)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw; one start of the processes serves all tests of this file."""
    folder: Path = tmp_path_factory.mktemp("engine")
    done = run_ranks(SCRIPT, 2, folder, str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_and_micro_batch_takes_the_same_path(reports: list[dict[str, Any]], name: str) -> None:
    for seen, expected in zip(reports[0][name], reports[0]["0/4"], strict=True):
        assert seen == pytest.approx(expected, rel=1e-5)
    for key, values in reports[0]["0/4/weights"].items():
        assert reports[0][f"{name}/weights"][key] == pytest.approx(values, abs=1e-5)


def test_the_path_leads_somewhere(reports: list[dict[str, Any]]) -> None:
    losses = [loss for loss, _, _ in reports[0]["0/4"]]
    assert len(set(losses)) == 5, "a trajectory that stands still would agree with anything"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_engine_repeats_the_very_numbers(reports: list[dict[str, Any]], stage: int) -> None:
    assert reports[0][f"{stage}/4/resumed"] == reports[0][f"{stage}/4"][3:]


@pytest.mark.parametrize("stage", range(4))
def test_the_first_update_is_the_same_in_bfloat16(reports: list[dict[str, Any]], stage: int) -> None:
    """Adam's first step moves a weight by the learning rate, 0.05, and decay by a fortieth of the weight. bfloat16
    rounds the outcome, and may turn a gradient near 0 around."""
    expected, seen = (reports[0][f"{stage}/{precision}"] for precision in ("float32", "bfloat16"))
    apart = [abs(a - b) for key in expected for a, b in zip(seen[key], expected[key], strict=True)]
    assert 0 < median(apart) < 0.001
    norms = [reports[0][f"{stage}/{precision}/norm"] for precision in ("float32", "bfloat16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_ranks_agree_and_only_the_first_holds_whole_weights(reports: list[dict[str, Any]]) -> None:
    assert all(reports[0][name] == reports[1][name] for name in NAMES)
    assert reports[1]["2/4/weights"] == {}


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(reports: list[dict[str, Any]]) -> None:
    assert all("loss is nan" in report["diverged"] for report in reports)


@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_ends_all_before_it_is_learnt(reports: list[dict[str, Any]], stage: int) -> None:
    """A finite loss may have one. Without ZeRO it would make every weight nan, with it the step would be left out."""
    for report in reports:
        assert "gradient's norm is" in report[f"{stage}/steep"]
        assert report[f"{stage}/kept"]


def test_collectives(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["sums"] == {"a": 3.0, "b": 1.0}
        assert report["gathered"] == ["rank 0", "rank 1"]
        assert report["any"] == [True, False]
        assert report["broadcast"] == {"from": 0}
