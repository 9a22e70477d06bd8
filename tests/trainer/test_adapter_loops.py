"""Whole attempts that train adapters: the artifact is a plain model that differs from its base where adapters were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.wire import FailureClass
from tests.trainer import training_world
from tests.trainer.ppo_world import PolicyWorld, make_policy_world, run_attempts, training_of
from tests.trainer.training_world import TinyWorld

LORA = {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def policy_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("adapter-world"), tiny_world)


@pytest.fixture(scope="module")
def attempts(policy_world: PolicyWorld, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapter-attempts")
    configs = {
        "policy": policy_world.config(
            folder / "policy", 2, training=training_of(lora=LORA, deepspeed={"zero_stage": 3}, steps=2)
        )
    }
    configs["first"] = policy_world.config(
        folder / "first", 2, training=training_of(lora=LORA, steps=1, ppo={"epochs": 1, "mini_batches": 1})
    )
    configs["reward"] = tiny_world.config(folder / "reward", 2, training=training_world.training_of(lora=LORA))
    return run_attempts(folder / "run", 2, configs)


def changed(result: dict[str, Any], base: Path, weights: str = "model.safetensors") -> set[str]:
    """Names of the weights that differ from the base's; all of the base's trunk must be there."""
    own, before = load_file(Path(result["artifact"]["path"]) / weights), load_file(base / "model.safetensors")
    assert {name for name in before if "lm_head" not in name} <= set(own)
    return {name for name, value in before.items() if name in own and not torch.equal(value, own[name])}


def test_only_adapted_layers_of_the_policy_change(attempts: Any, policy_world: PolicyWorld) -> None:
    result = attempts["policy"]
    assert result["failureClass"] == FailureClass.SUCCESS, result["message"]
    names = changed(result, policy_world.base)
    assert names
    assert all("q_proj" in name or "down_proj" in name for name in names)


def test_the_first_rollout_has_no_divergence_at_all(attempts: Any) -> None:
    metrics = attempts["first"]["metrics"]
    assert metrics["kl"] == 0.0
    assert metrics["samplerGap"] < 1e-5


def test_reward_models_train_adapters_and_their_heads(attempts: Any, tiny_world: TinyWorld) -> None:
    result = attempts["reward"]
    assert result["failureClass"] in (FailureClass.SUCCESS, FailureClass.GATE_FAILED), result["message"]
    for member in range(2):
        names = changed(result, tiny_world.base, f"members/{member}/model.safetensors")
        assert names
        assert all("q_proj" in name or "down_proj" in name for name in names)
