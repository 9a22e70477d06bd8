"""Every algorithm at every ZeRO stage, all weights or adapters, on two ranks that accumulate gradients.

Stages differ in where things lie and in nothing else: figures of every step and the weights agree with stage 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_trainer.config import Checkpoints, GuardrailMetric
from rlhf_trainer.preflight_training import reported
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located
from tests.trainer import training_world
from tests.trainer.algorithms import ONLINE, VARIANTS
from tests.trainer.every_algorithm import ALGORITHMS, LORA, REWARD_MODEL, EveryAlgorithm
from tests.trainer.ppo_world import history, run_attempts, weights
from tests.trainer.training_world import TinyWorld

# A variant shares all but its loss with its algorithm: two stages do, and float32.
STAGES = {algorithm: (0, 3) if algorithm in VARIANTS else (0, 1, 2, 3) for algorithm in ALGORITHMS}
ROUNDED = [algorithm for algorithm in ALGORITHMS if algorithm not in VARIANTS]
REACHES: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
COMPARED = [
    (algorithm, reach, stage) for algorithm in ALGORITHMS for reach in REACHES for stage in STAGES[algorithm][1:]
]
LEARNING_RATE = 0.01


def settings(algorithm: str) -> dict[str, Any]:
    """Two optimiser steps per attempt, each of two backward passes or more on either rank."""
    if algorithm == REWARD_MODEL:
        return {"learning_rate": LEARNING_RATE, "global_batch_size": 16, "micro_batch_size": 4}
    rows: dict[str, Any] = {"steps": 2, "micro_batch_size": 2, "learning_rate": LEARNING_RATE}
    if algorithm in ONLINE:
        own = ONLINE[algorithm].get("ppo", {})
        rows["ppo"] = {**own, "epochs": 1, "mini_batches": 1, "critic_warmup_steps": 0}
    return rows


@pytest.fixture(scope="module")
def configs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AttemptConfig]:
    folder = tmp_path_factory.mktemp("zero-stages")
    every = EveryAlgorithm(folder / "world", tiny_world)
    pairs = training_world.write_rows(folder / "pairs.jsonl", training_world.preference_rows(48, seed=2))
    found = {}
    for algorithm in ALGORITHMS:
        wanted = {
            f"{reach}-{stage}": {**changes, "deepspeed": {"zero_stage": stage}}
            for reach, changes in REACHES.items()
            for stage in STAGES[algorithm]
        }
        if algorithm in ROUNDED:
            wanted["bfloat16"] = {"precision": "bfloat16", "deepspeed": {"zero_stage": 2}}
        fields: dict[str, Any] = {"checkpoints": Checkpoints(every_steps=100, keep_last=1)}
        if algorithm == REWARD_MODEL:
            fields["preferences"] = Located(path=str(pairs))
        for label, changes in wanted.items():
            name = f"{algorithm}-{label}"
            found[name] = every.attempt(algorithm, folder / name, 2, {**settings(algorithm), **changes}, **fields)
    return found


@pytest.fixture(scope="module")
def results(configs: dict[str, AttemptConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_attempts(tmp_path_factory.mktemp("zero-stages-run"), 2, configs)


def trained(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The artifact's weights; of a reward model, those of its first member."""
    folder = Path(result["artifact"]["path"]) / "members" / "0"
    return weights({"artifact": {"path": str(folder)}} if folder.exists() else result)


@pytest.mark.parametrize(("algorithm", "reach", "stage"), COMPARED)
def test_every_stage_takes_the_path_of_stage_0(
    configs: dict[str, AttemptConfig], results: dict[str, Any], algorithm: str, reach: str, stage: int
) -> None:
    """Order of summation differs: weights agree within a fiftieth of one update."""
    first, other = f"{algorithm}-{reach}-0", f"{algorithm}-{reach}-{stage}"
    for name in (first, other):
        assert results[name]["failureClass"] in (FailureClass.SUCCESS, FailureClass.GATE_FAILED), results[name]
    expected, steps = history(configs[first]), history(configs[other])
    assert len(steps) == len(expected) >= 2
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    ours_, theirs_ = trained(results[other]), trained(results[first])
    assert ours_.keys() == theirs_.keys()
    for key, tensor in ours_.items():
        torch.testing.assert_close(tensor, theirs_[key], atol=LEARNING_RATE / 50, rtol=0, msg=f"{other}: {key}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_full_training_and_adapters_are_different_paths(results: dict[str, Any], algorithm: str) -> None:
    """Negative control: the comparison above would notice another path."""
    full, adapted = (trained(results[f"{algorithm}-{reach}-0"]) for reach in REACHES)
    moved = {key: float((tensor - adapted[key]).abs().max()) for key, tensor in full.items()}
    assert max(moved.values()) > LEARNING_RATE / 2


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_guardrails_may_watch_what_every_step_reports_and_nothing_else(
    configs: dict[str, AttemptConfig], algorithm: str
) -> None:
    """Preflight refuses a guardrail on any other metric, since it would watch nothing."""
    config = configs[f"{algorithm}-full-0"]
    for step in history(config):
        assert {metric for metric in GuardrailMetric if metric.value in step} == reported(config)


@pytest.mark.parametrize("algorithm", ROUNDED)
def test_bfloat16_learns_what_float32_learns_more_coarsely(
    configs: dict[str, AttemptConfig], results: dict[str, Any], algorithm: str
) -> None:
    """Master weights are float32, so the paths differ by rounding, and they do differ."""
    name, exact = f"{algorithm}-bfloat16", f"{algorithm}-full-2"
    assert results[name]["failureClass"] in (FailureClass.SUCCESS, FailureClass.GATE_FAILED), results[name]
    for ours, theirs in zip(history(configs[name]), history(configs[exact]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2, abs=1e-3)
    expected = trained(results[exact])
    apart = torch.cat([(tensor - expected[key]).abs().flatten() for key, tensor in trained(results[name]).items()])
    assert 0 < float(apart.median()) < LEARNING_RATE / 20
