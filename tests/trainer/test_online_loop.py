"""Every online algorithm as a whole attempt on the real engine: splits, resume, warm-up, constraints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.config import Checkpoints
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located
from tests.trainer.algorithms import LENGTH, ONLINE, SAFETY
from tests.trainer.ppo_world import (
    NO_GATE,
    PolicyWorld,
    history,
    make_policy_world,
    run_attempts,
    strict_filter,
    training_of,
    weights,
)
from tests.trainer.training_world import TinyWorld

SMALL: dict[str, Any] = {"prompts_per_step": 4, "samples_per_prompt": 2}
# Ranks by rows per backward pass, against one rank and passes of four rows.
_OTHERS = {"ppo": ("1-by-1", "1-by-8", "2-by-4"), "grpo": ("1-by-1",)}
SPLITS = [(name, split) for name in ONLINE for split in (*_OTHERS.get(name, ()), "2-by-2")]
ONE_PASS = {"epochs": 1, "mini_batches": 1}


@pytest.fixture(scope="module")
def world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("online-world"), tiny_world)


@pytest.fixture(scope="module")
def filter_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strict_filter(tmp_path_factory.mktemp("filter") / "filter.json")


class Runs:
    """Attempts by name, made in as few processes as possible."""

    def __init__(self, world: PolicyWorld, folder: Path, filter_path: Path) -> None:
        self._world, self._folder = world, folder
        self._filter = Located(path=str(filter_path))
        self.configs: dict[str, AttemptConfig] = {}
        self.results: dict[str, Any] = {}

    def plan(self, name: str, world_size: int = 1, output: str | None = None, **changes: Any) -> None:
        attempt = changes.pop("attempt", 1)
        filtered = {"safety_filter": self._filter} if changes.pop("filtered", True) else {}
        self.configs[name] = self._world.config(
            self._folder / (output or name),
            world_size,
            training=training_of(**SMALL, **changes),
            attempt=attempt,
            checkpoints=Checkpoints(every_steps=2, keep_last=1),
            evaluation=NO_GATE,
            **filtered,
        )

    def run(self, stop_after: dict[str, int]) -> None:
        for ranks in (1, 2):
            chosen = {name: config for name, config in self.configs.items() if config.world_size == ranks}
            self.results |= run_attempts(self._folder / f"on-{ranks}", ranks, chosen, stop_after)

    def first_step(self, name: str) -> dict[str, float]:
        return history(self.configs[name])[0]


@pytest.fixture(scope="module")
def runs(world: PolicyWorld, filter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(world, tmp_path_factory.mktemp("online"), filter_path)
    for name, algorithm in ONLINE.items():
        runs.plan(f"{name}-whole", steps=4, **algorithm)
        runs.plan(f"{name}-stopped", steps=4, output=f"{name}-halves", **algorithm)
        runs.plan(f"{name}-resumed", steps=4, output=f"{name}-halves", attempt=2, **algorithm)
        once = {**algorithm, "steps": 1, "ppo": {**algorithm.get("ppo", {}), **ONE_PASS, "critic_warmup_steps": 0}}
        runs.plan(f"{name}-1-by-4", micro_batch_size=4, **once)
        for split in (split for own, split in SPLITS if own == name):
            ranks, _, rows = split.partition("-by-")
            runs.plan(f"{name}-{split}", world_size=int(ranks), micro_batch_size=int(rows), **once)
    for critic in ("shared", "separate"):
        warming = {"critic": critic, "critic_warmup_steps": 2}
        runs.plan(f"warming-{critic}", steps=2, ppo=warming, constraints=[LENGTH])
    fixed = {"controller": "fixed", "coefficient": 0.07}
    runs.plan("adapted", steps=2, ppo={"critic": "separate"}, lora={"rank": 2}, kl=fixed)
    eager = {"epochs": 4, "mini_batches": 2}
    runs.plan("patient", steps=2, world_size=2, ppo={**eager, "target_kl": 100.0}, reward_std_penalty=0.0)
    runs.plan("stopping", steps=2, world_size=2, ppo={**eager, "target_kl": 1e-12}, reward_std_penalty=1.0)
    runs.plan("odd", micro_batch_size=3)
    runs.plan("unfiltered", constraints=[SAFETY], filtered=False)
    runs.run({f"{name}-stopped": 2 for name in ONLINE})
    return runs


@pytest.mark.parametrize("name", ONLINE)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs: Runs, name: str) -> None:
    whole, stopped, resumed = (f"{name}-{part}" for part in ("whole", "stopped", "resumed"))
    assert runs.results[stopped]["failureClass"] == FailureClass.PREEMPTED, runs.results[stopped]
    assert runs.results[resumed]["failureClass"] == FailureClass.SUCCESS, runs.results[resumed]["message"]
    assert runs.results[resumed]["resumedFrom"]["step"] == 2
    steps = history(runs.configs[whole])
    assert history(runs.configs[stopped]) == steps[:2]
    assert history(runs.configs[resumed]) == steps[2:]
    expected = weights(runs.results[whole])
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(runs.results[resumed]).items())


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_a_step_does_not_depend_on_how_its_batch_is_split(runs: Runs, name: str, split: str) -> None:
    """Against one process and two backward passes: passes of one row, two processes of two passes each, and PPO where a
    pass holds all rows, so that its values come out of it (``single_pass``)."""
    whole, other = runs.first_step(f"{name}-1-by-4"), runs.first_step(f"{name}-{split}")
    assert other == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert whole["gradientNorm"] > 1e-3  # and there was a gradient to compare
    expected = weights(runs.results[f"{name}-1-by-4"])
    for key, tensor in weights(runs.results[f"{name}-{split}"]).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ONLINE)
def test_the_first_mini_batch_is_on_policy_and_at_the_reference(runs: Runs, name: str) -> None:
    first = runs.first_step(f"{name}-1-by-4")
    assert (first["clipFraction"], first["kl"]) == (0.0, 0.0)
    assert first["approxKl"] == pytest.approx(0.0, abs=1e-9)
    assert first["importanceRatioMean"] == pytest.approx(1.0, abs=1e-5)
    assert first["importanceRatioP95"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ONLINE)
def test_every_algorithm_moves_the_policy(runs: Runs, name: str, world: PolicyWorld) -> None:
    """Negative control of the comparisons above."""
    base = load_file(world.base / "model.safetensors")
    moved = weights(runs.results[f"{name}-whole"])
    assert max(float((moved[key] - base[key]).abs().max()) for key in moved) > 0.005
    assert history(runs.configs[f"{name}-whole"])[-1]["kl"] != 0.0


def test_samples_of_a_prompt_differ(runs: Runs) -> None:
    assert runs.first_step("grpo-1-by-4")["zeroVarianceFraction"] < 1.0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_warming_up_moves_the_critic_and_not_the_policy(runs: Runs, world: PolicyWorld, critic: str) -> None:
    base = load_file(world.base / "model.safetensors")
    found = weights(runs.results[f"warming-{critic}"])
    assert all(torch.equal(found[key], base[key]) for key in found)
    first, second = history(runs.configs[f"warming-{critic}"])
    assert first["explainedVariance"] == pytest.approx(0.0, abs=1e-6)
    assert abs(second["explainedVariance"]) > 1e-4  # the critic says something now
    # Prices wait for a policy that can answer to them.
    assert first["klCoefficient"] == second["klCoefficient"]
    assert first["lengthMultiplier"] == second["lengthMultiplier"]


def test_a_separate_critic_trains_beside_an_adapted_policy(runs: Runs, world: PolicyWorld) -> None:
    assert runs.results["adapted"]["failureClass"] == FailureClass.SUCCESS, runs.results["adapted"]["message"]
    base, found = load_file(world.base / "model.safetensors"), weights(runs.results["adapted"])
    assert found.keys() == base.keys()
    assert not all(torch.equal(found[key], base[key]) for key in found)
    first, second = history(runs.configs["adapted"])
    assert abs(second["explainedVariance"]) > abs(first["explainedVariance"])


def test_constraints_are_priced_in_the_loop(runs: Runs) -> None:
    steps = history(runs.configs["rloo-whole"])
    assert [step["safetyCost"] for step in steps] == [1.0] * 4
    assert [step["safetyMultiplier"] for step in steps] == pytest.approx([0.9, 1.0, 1.0, 1.0])
    assert [step["unsatisfiedConstraints"] for step in steps] == [0.0, 1.0, 1.0, 1.0]
    # The window of 16 holds the responses of two steps.
    expected, costs = 1.0, [step["lengthCost"] for step in steps]
    for index, step in enumerate(steps):
        assert step["lengthCost"] == step["responseLength"]
        assert step["lengthMultiplier"] == pytest.approx(expected)
        latest = costs[max(0, index - 1) : index + 1]
        expected += 0.05 * (sum(latest) / len(latest) - 3.0)


def test_the_kl_coefficient_follows_the_kl_of_each_step_unless_it_is_fixed(runs: Runs) -> None:
    """Towards a target of 0.15 nats over a horizon of 50 samples, of which a step has 8."""
    steps, expected = history(runs.configs["grpo-whole"]), 0.1
    for step in steps:
        assert step["klCoefficient"] == pytest.approx(expected)
        expected *= 1 + max(-0.2, min(0.2, step["kl"] / 0.15 - 1)) * 8 / 50
    assert {step["kl"] > 0.15 for step in steps} == {True, False}  # and went both ways
    assert [step["klCoefficient"] for step in history(runs.configs["adapted"])] == [0.07, 0.07]


def test_rewards_are_penalised_by_the_disagreement_of_the_ensemble(runs: Runs) -> None:
    """The same first samples, with a penalty of 0 and of 1 per unit."""
    lenient, strict = runs.first_step("patient"), runs.first_step("stopping")
    assert lenient["ensembleStd"] == pytest.approx(strict["ensembleStd"])
    assert lenient["ensembleStd"] > 0.01
    assert strict["reward"] == pytest.approx(lenient["reward"] - lenient["ensembleStd"], abs=1e-5)


def test_target_kl_ends_the_passes_on_every_rank_together(runs: Runs) -> None:
    assert [step["passes"] for step in history(runs.configs["patient"])] == [4.0, 4.0]
    assert [step["passes"] for step in history(runs.configs["stopping"])] == [1.0, 1.0]


def test_what_cannot_run_is_refused_in_words(runs: Runs) -> None:
    odd, unfiltered = runs.results["odd"], runs.results["unfiltered"]
    assert odd["failureClass"] == unfiltered["failureClass"] == FailureClass.INVALID
    assert "microBatchSize is 3" in odd["message"]
    assert "spec.evaluation.safetyFilter, which is not set" in unfiltered["message"]
