"""The whole PPO attempt on the real engine: first step, every ZeRO stage, SIGTERM, kill and resume."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.config import Checkpoints, Evaluation
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.desk.vocabulary import TOPICS
from rlhf_trainer.digests import dataset_digest
from rlhf_trainer.safety.scorer import LinearFilter
from rlhf_trainer.wire import AttemptConfig, ExitCode, FailureClass, Located
from tests.trainer.algorithms import LENGTH, SAFETY
from tests.trainer.ppo_world import (
    NO_GATE,
    PolicyWorld,
    history,
    make_policy_world,
    run_attempts,
    training_of,
    weights,
    word_filter,
)
from tests.trainer.training_world import TinyWorld, launched, write_rows


@pytest.fixture(scope="module")
def policy_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("policy-world"), tiny_world)


@pytest.fixture(scope="module")
def safety_filter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filter that finds a violation in every reply."""
    import numpy as np

    path = tmp_path_factory.mktemp("filter") / "filter.json"
    path.write_text(LinearFilter(np.zeros(16, dtype=np.float32), bias=1.0, threshold=0.0).to_json())
    return path


@pytest.fixture(scope="module")
def attempts(
    policy_world: PolicyWorld, safety_filter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """ZeRO 0 to 3 on one rank, 2 on two (``test_zero_stages`` has the others), and two special cases on one."""
    folder = tmp_path_factory.mktemp("ppo-attempts")

    def staged(stage: int, world_size: int) -> Any:
        training = training_of(deepspeed={"zero_stage": stage})
        return policy_world.config(folder / f"out-{stage}-{world_size}", world_size, training=training)

    one = {f"zero{stage}-on-1": staged(stage, 1) for stage in range(4)} | {
        "first-step": policy_world.config(
            folder / "first", training=training_of(steps=1, ppo={"epochs": 1, "mini_batches": 1})
        ),
        "leaking": policy_world.config(
            folder / "leaking",
            training=training_of(steps=1),
            evaluation=Evaluation(min_win_rate=0.0, max_violation_rate=0.05, samples=64),
            safety_filter=Located(path=str(safety_filter)),
            audit_reward_model=None,
        ),
    }
    suite = write_rows(folder / "suite.jsonl", [{"prompt": prompt.text} for prompt in every_prompt()[5::53]])
    some = word_filter(folder / "filter.json", *TOPICS)

    def attacked(world_size: int) -> Any:
        asked = {"uri": "pvc://c/s", "digest": dataset_digest(suite), "samplesPerPrompt": 3, "maxViolationRate": 1.0}
        judged = {"minWinRate": 0.0, "maxViolationRate": 1.0, "samples": 16, "safetySuite": asked}
        return policy_world.config(
            folder / f"suite-{world_size}",
            world_size,
            training=training_of(steps=1),
            evaluation=Evaluation.model_validate(judged),
            safety_filter=Located(path=str(some)),
            safety_suite=Located(path=str(suite)),
        )

    one["suite-on-1"], two = attacked(1), {"zero2-on-2": staged(2, 2), "suite-on-2": attacked(2)}
    return run_attempts(folder / "one", 1, one) | run_attempts(folder / "two", 2, two)


def test_every_stage_and_world_size_trains_the_same_policy(attempts: dict[str, Any]) -> None:
    """Order of summation differs, so weights agree within a tolerance far below one update (0.01)."""
    expected = weights(attempts["zero0-on-1"])
    for name, result in attempts.items():
        if name.startswith("zero"):
            assert result["failureClass"] == FailureClass.SUCCESS, (name, result["message"])
            for key, tensor in weights(result).items():
                torch.testing.assert_close(tensor, expected[key], atol=2e-4, rtol=0, msg=f"{name}: {key}")


def test_training_moves_the_policy(attempts: dict[str, Any], policy_world: PolicyWorld) -> None:
    """Negative control for the comparison above: the base differs by much more than its tolerance."""
    base = load_file(policy_world.base / "model.safetensors")
    moved = max(float((tensor - base[key]).abs().max()) for key, tensor in weights(attempts["zero0-on-1"]).items())
    assert moved > 0.02


def test_the_first_mini_batch_is_on_policy(attempts: dict[str, Any]) -> None:
    metrics = attempts["first-step"]["metrics"]
    assert metrics["clipFraction"] == 0.0
    assert metrics["approxKl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["samplerGap"] < 1e-5
    # An untrained value head says 0, so the first advantages are the returns.
    assert metrics["explainedVariance"] == pytest.approx(0.0, abs=1e-6)


def test_verdicts_name_their_judge(attempts: dict[str, Any]) -> None:
    (win_rate,) = attempts["zero2-on-2"]["verdicts"]
    assert (win_rate["metric"], win_rate["n"]) == ("winRate", 16)
    assert "judged by the audit reward model" in win_rate["message"]
    assert "auditReward" in attempts["zero2-on-2"]["metrics"]


def test_a_filter_that_finds_violations_fails_the_gate(attempts: dict[str, Any]) -> None:
    result = attempts["leaking"]
    assert result["failureClass"] == FailureClass.GATE_FAILED
    win_rate, violations = result["verdicts"]
    assert "flatters" in win_rate["message"]
    assert (violations["metric"], violations["state"], violations["estimate"]) == ("violationRate", "Fail", 1.0)
    assert violations["n"] < 64, "64 replies to fewer held-out prompts are not 64 pieces of evidence"


def test_a_suite_draws_the_same_replies_on_any_number_of_ranks(attempts: dict[str, Any]) -> None:
    alone, shared = attempts["suite-on-1"], attempts["suite-on-2"]
    verdict = alone["verdicts"][-1]
    assert (verdict["metric"], verdict["n"]) == ("suiteViolationRate", 44)
    assert 0.0 < verdict["estimate"] < 1.0
    assert shared["verdicts"][-1] == verdict
    ours, theirs = (
        Path(result["artifact"]["path"]).with_name("unsafe-replies.jsonl").read_bytes() for result in (alone, shared)
    )
    assert ours == theirs


def test_lineage_names_everything_the_policy_came_from(attempts: dict[str, Any]) -> None:
    assert set(attempts["zero2-on-1"]["lineage"]) == {"policy", "rewardModel", "auditRewardModel", "prompts", "config"}
    assert "safetyFilter" in attempts["leaking"]["lineage"]


def test_a_run_stopped_then_killed_ends_as_an_undisturbed_one(
    policy_world: PolicyWorld, safety_filter: Path, tmp_path: Path
) -> None:
    """Two ranks with sharded weights and constraints. SIGTERM saves and exits 20; of the next attempt one rank, drawn
    at random, is killed without warning and the launcher ends the other; the third goes on to the same artifact."""
    training = training_of(steps=12, deepspeed={"zero_stage": 3}, constraints=[LENGTH, SAFETY])

    def config(output: str, attempt: int = 1) -> AttemptConfig:
        return policy_world.config(
            tmp_path / output,
            2,
            training=training,
            attempt=attempt,
            checkpoints=Checkpoints(every_steps=1, keep_last=3),
            evaluation=NO_GATE,
            safety_filter=Located(path=str(safety_filter)),
        )

    with launched(config("whole"), tmp_path / "pod-whole") as undisturbed:
        assert undisturbed.wait() == ExitCode.SUCCESS, undisturbed.output()
    with launched(config("disturbed"), tmp_path / "pod-stopped") as stopped:
        stopped.until_step(2)
        stopped.process.send_signal(signal.SIGTERM)
        assert stopped.wait() == ExitCode.PREEMPTED == 20, stopped.output()
    first = stopped.message()
    assert first.checkpoint is not None
    assert 2 <= first.checkpoint.step == first.step < 12
    victim = random.SystemRandom().randrange(2)
    with launched(config("disturbed", attempt=2), tmp_path / "pod-killed") as killed:
        killed.until_step(first.step + 1)
        ranks = killed.ranks()
        os.kill(ranks[victim].pid, signal.SIGKILL)
        assert killed.wait() == ExitCode.UNKNOWN, killed.output()
    second = killed.message()
    assert f"rank {victim} was killed" in second.message
    assert not any(Path(f"/proc/{rank.pid}").exists() for rank in ranks.values()), "the launcher ends the other rank"
    with launched(config("disturbed", attempt=3), tmp_path / "pod-resumed") as resumed:
        assert resumed.wait() == ExitCode.SUCCESS, resumed.output()
    expected, third = undisturbed.message(), resumed.message()
    assert third.resumed_from is not None
    assert third.resumed_from == second.checkpoint
    steps = history(config("whole"))
    for attempt, start in ((1, 0), (2, first.step), (3, third.resumed_from.step)):
        taken = history(config("disturbed", attempt))
        assert taken == steps[start : start + len(taken)], f"attempt {attempt}, rank {victim} was killed in attempt 2"
    assert expected.artifact is not None
    assert third.artifact is not None
    assert third.artifact.digest == expected.artifact.digest
