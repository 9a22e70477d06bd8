"""Every algorithm at every ZeRO stage, all weights or adapters, on two ranks that accumulate gradients.

Stages differ in where things lie and in nothing else: figures of every step and the weights agree with stage 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_trainer.config import Checkpoints, GuardrailMetric
from rlhf_trainer.preflight_training import reported
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located
from tests.trainer import offline_world, training_world
from tests.trainer.algorithms import OFFLINE, ONLINE
from tests.trainer.offline_world import OfflineWorld, make_offline_world
from tests.trainer.ppo_world import NO_GATE, history, run_attempts, strict_filter, training_of, weights
from tests.trainer.training_world import TinyWorld

STAGES = (0, 1, 2, 3)
REACHES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {"rank": 2, "alpha": 8.0}}}
REWARD_MODEL = "reward-model"
ALGORITHMS = (REWARD_MODEL, *ONLINE, *OFFLINE)
LEARNING_RATE = 0.01
# Two optimiser steps per attempt, each of two backward passes on either rank.
ROWS: dict[str, Any] = {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "micro_batch_size": 2}


def attempt(world: OfflineWorld, tiny: TinyWorld, output: Path, algorithm: str, changes: Mapping[str, Any]) -> Any:
    """Two steps of ``algorithm`` on two ranks, with nothing to judge it by."""
    changes = {**changes, "learning_rate": LEARNING_RATE}
    checkpoints = Checkpoints(every_steps=100, keep_last=1)
    if algorithm == REWARD_MODEL:
        small = training_world.write_rows(output.parent / "pairs.jsonl", training_world.preference_rows(48, seed=2))
        training = training_world.training_of(global_batch_size=16, micro_batch_size=4, **changes)
        return tiny.config(output, 2, training=training, checkpoints=checkpoints, preferences=Located(path=str(small)))
    if algorithm in OFFLINE:
        rows = {**ROWS, "prompts_per_step": 8, "samples_per_prompt": 1, **OFFLINE[algorithm], **changes}
        training = offline_world.training_of(algorithm, **rows)
        return world.config(output, training, 2, checkpoints=checkpoints, evaluation=NO_GATE)
    own = ONLINE[algorithm]
    once = {**own.get("ppo", {}), "epochs": 1, "mini_batches": 1, "critic_warmup_steps": 0}
    training = training_of(**{**ROWS, **own, **changes, "ppo": once})
    filtered = Located(path=str(strict_filter(output.parent / "filter.json")))
    return world.policy.config(
        output,
        2,
        training=training,
        checkpoints=checkpoints,
        safety_filter=filtered,
        audit_reward_model=None,
        evaluation=NO_GATE,
    )


@pytest.fixture(scope="module")
def configs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AttemptConfig]:
    folder = tmp_path_factory.mktemp("zero-stages")
    world = make_offline_world(folder / "world", tiny_world)
    found = {}
    for algorithm in ALGORITHMS:
        for reach, changes in REACHES.items():
            for stage in STAGES:
                name = f"{algorithm}-{reach}-{stage}"
                options = {**changes, "deepspeed": {"zero_stage": stage}}
                found[name] = attempt(world, tiny_world, folder / name, algorithm, options)
        options = {"precision": "bfloat16", "deepspeed": {"zero_stage": 2}}
        found[f"{algorithm}-bfloat16"] = attempt(world, tiny_world, folder / f"{algorithm}-bf16", algorithm, options)
    return found


@pytest.fixture(scope="module")
def results(configs: dict[str, AttemptConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_attempts(tmp_path_factory.mktemp("zero-stages-run"), 2, configs)


def trained(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The artifact's weights; of a reward model, those of its first member."""
    folder = Path(result["artifact"]["path"]) / "members" / "0"
    return weights({"artifact": {"path": str(folder)}} if folder.exists() else result)


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
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
