"""Learning from a batch in one pass is learning from it after a pass of its own: same figures, same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_trainer.config import Algorithm, PolicyTraining
from rlhf_trainer.distributed import join
from rlhf_trainer.engine import Engine
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.loops.single_pass import learns_in_one_pass
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig, FailureClass, Result
from rlhf_trainer.worker import load_loop, run_attempt
from tests.trainer.ppo_world import NO_GATE, PolicyWorld, history, make_policy_world, training_of, weights
from tests.trainer.training_world import TinyWorld

ONCE = {"epochs": 1, "mini_batches": 1}
IN_LOSS = {"placement": "loss", "estimator": "k3", "coefficient": 0.1, "target": 0.5, "horizon": 50}
CASES: dict[str, dict[str, Any]] = {
    "GRPO, KL in the loss": {"algorithm": "GRPO", "kl": IN_LOSS},
    "GRPO, KL in the reward": {"algorithm": "GRPO"},
    "RLOO": {"algorithm": "RLOO", "loss_normalization": "maxLength"},
    "REINFORCE++": {"algorithm": "ReinforcePlusPlus", "ppo": {**ONCE, "gamma": 0.9}},
    "PPO": {"algorithm": "PPO", "samples_per_prompt": 1, "micro_batch_size": 4},
    "PPO, a critic of its own, warmed up": {
        "algorithm": "PPO",
        "micro_batch_size": 8,
        "ppo": {**ONCE, "critic": "separate", "critic_warmup_steps": 1},
    },
}


@pytest.fixture(scope="module")
def world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("single-pass-world"), tiny_world)


@pytest.fixture(autouse=True)
def any_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STATUS_PORT", "0")


def run(world: PolicyWorld, folder: Path, **changes: Any) -> tuple[AttemptConfig, Result]:
    small = {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "micro_batch_size": 4, "ppo": ONCE}
    config = world.config(folder / "run", training=training_of(**{**small, **changes}), evaluation=NO_GATE)
    ranks = RankFiles(folder / "ranks", 0)
    ranks.folder.mkdir(parents=True)
    return config, run_attempt(config, load_loop(config.kind), join(timedelta(seconds=60)), ranks, StopSignal())


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_step_that_looks_first(
    world: PolicyWorld, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, after = run(world, tmp_path / "once", **CASES[name])
    monkeypatch.setattr("rlhf_trainer.loops.online.learns_in_one_pass", lambda *_given: False)
    looked, expected = run(world, tmp_path / "twice", **CASES[name])
    assert after.failure_class is expected.failure_class is FailureClass.SUCCESS, after.message
    steps, wanted = history(once), history(looked)
    assert steps[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)
    # Adam divides by the gradient's size, so that rounding of the smallest gradients moves weights by a little.
    assert steps[-1] == pytest.approx(wanted[-1], rel=0.02, abs=1e-4)
    reached = weights(json.loads(expected.to_json()))
    for key, tensor in weights(json.loads(after.to_json())).items():
        torch.testing.assert_close(tensor, reached[key], atol=1e-3, rtol=0, msg=key)


def test_a_sampler_with_other_weights_is_noticed_after_the_pass(
    world: PolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a step that learnt from it is kept: the attempt ends before the step is recorded."""
    plain = CachedGenerator.generate

    def stale(self: CachedGenerator, *arguments: Any) -> Any:
        said = plain(self, *arguments)
        return [replace(each, logprobs=tuple(value - 0.5 for value in each.logprobs)) for each in said]

    monkeypatch.setattr(CachedGenerator, "generate", stale)
    config, result = run(world, tmp_path, algorithm="GRPO", kl=IN_LOSS)
    assert result.failure_class is not FailureClass.SUCCESS
    assert "does not hold the trainer's weights" in result.message
    assert not (Path(config.output.path) / "a1" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "looks_first",
    [
        {"algorithm": Algorithm.PPO, "ppo": {"epochs": 2, "mini_batches": 1}},
        {"algorithm": Algorithm.BEST_OF_N},
        {"algorithm": Algorithm.GRPO, "ppo": {"epochs": 2, "mini_batches": 1}},
        {"algorithm": Algorithm.GRPO, "ppo": {"epochs": 1, "mini_batches": 2}},
        {"algorithm": Algorithm.GRPO, "generation": {"engine": "vllm"}},
    ],
)
def test_what_is_learnt_from_more_than_once_is_looked_at_first(looks_first: dict[str, Any]) -> None:
    fields = {"samples_per_prompt": 2, "ppo": ONCE, **looks_first}
    assert not learns_in_one_pass(PolicyTraining.model_validate(fields), 1)


def test_a_critics_values_must_all_come_from_one_backward_pass() -> None:
    for algorithm, backward_passes, possible in (("GRPO", 1, 1), ("GRPO", 2, 1), ("PPO", 1, 1), ("PPO", 2, 0)):
        training = PolicyTraining.model_validate({"samples_per_prompt": 2, "algorithm": algorithm, "ppo": ONCE})
        assert learns_in_one_pass(training, backward_passes) == bool(possible)


@pytest.mark.parametrize(
    ("algorithm", "micro_rows", "forwards"),
    [("RLOO", 4, 2), ("PPO", 8, 1), ("PPO", 4, 3)],  # of eight rows; the last looks at all of them first
)
def test_a_trainer_that_learns_in_one_pass_collects_without_one(
    world: PolicyWorld, algorithm: str, micro_rows: int, forwards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Engine.forward

    def counted(self: Engine, *arguments: Any) -> Any:
        calls.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(Engine, "forward", counted)
    monkeypatch.setattr(Engine, "__call__", counted)
    run(world, tmp_path, steps=1, algorithm=algorithm, micro_batch_size=micro_rows)
    assert len(calls) == forwards


@pytest.mark.parametrize("updates", [1, 4])
def test_the_gradient_norm_of_a_step_is_the_mean_over_its_updates(
    world: PolicyWorld, updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a guardrail watches: the last of four updates alone would hide what the others saw."""
    norms: list[float] = []
    step = Engine.step

    def recorded(engine: Engine, learning_rate: float | None = None) -> None:
        step(engine, learning_rate)
        norms.append(engine.gradient_norm)

    monkeypatch.setattr(Engine, "step", recorded)
    ppo = ONCE if updates == 1 else {"epochs": 2, "mini_batches": 2}
    config, result = run(world, tmp_path, ppo=ppo, algorithm="PPO")
    assert result.failure_class is FailureClass.SUCCESS, result.message
    means = [sum(norms[at : at + updates]) / updates for at in range(0, len(norms), updates)]
    assert len(set(norms)) == 3 * updates
    assert [each["gradientNorm"] for each in history(config)] == pytest.approx(means)
