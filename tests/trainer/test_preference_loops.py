"""Attempts of every algorithm that learns from given texts, on the real engine: DPO, KTO, SFT, distillation.

Sharding, ranks and gradient accumulation must not change what is learnt, and a run that was interrupted must end in
the artifact of one that was not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.config import Algorithm, Evaluation, GuardrailAction, GuardrailMetric, Opponent, TrainingGuardrail
from rlhf_trainer.preflight_training import REPORTED
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located
from tests.trainer.algorithms import OFFLINE
from tests.trainer.offline_world import OfflineWorld, make_offline_world, training_of
from tests.trainer.ppo_world import run_attempts, weights
from tests.trainer.training_world import TinyWorld

PAUSE = TrainingGuardrail(metric=GuardrailMetric.ENTROPY, above=-1.0, for_steps=2, action=GuardrailAction.PAUSE)


@pytest.fixture(scope="module")
def offline_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> OfflineWorld:
    return make_offline_world(tmp_path_factory.mktemp("offline-world"), tiny_world)


def variants(world: OfflineWorld, folder: Path) -> dict[str, AttemptConfig]:
    """Of every family: ZeRO 0 and 2, and the latter in two halves of two steps."""
    judged: dict[str, dict[str, Any]] = {name: {} for name in OFFLINE} | {
        "KTO": {"audit_reward_model": Located(path=str(world.policy.audit)), "evaluation": lenient()},
        "Distillation": {
            "audit_reward_model": Located(path=str(world.policy.audit)),
            "evaluation": lenient(against=Opponent.TEACHER),
        },
    }
    configs: dict[str, AttemptConfig] = {}
    for name, changes in OFFLINE.items():

        def attempt(label: str, output: str, name: str = name, changes: dict[str, Any] = changes, **more: Any) -> None:
            of_attempt = {key: more.pop(key) for key in ("guardrails", "attempt") if key in more}
            training = training_of(name, **{**changes, **more})
            extra = {**judged[name], **of_attempt}
            configs[f"{name}-{label}"] = world.config(folder / f"{name}-{output}", training, **extra)

        attempt("zero0", "zero0", deepspeed={"zero_stage": 0})
        attempt("zero2", "zero2")
        attempt("half", "halves", guardrails=(PAUSE,))
        attempt("rest", "halves", attempt=2)
    sequence = training_of("Distillation", distillation={"mode": "sequence"})
    configs["sequence"] = world.config(folder / "sequence", sequence)
    # So few rows a step that the loss follows from the other figures of the step.
    ipo = training_of("DPO", dpo={"loss": "ipo", "beta": 0.2, "label_smoothing": 0.1}, prompts_per_step=1)
    configs["ipo"] = world.config(folder / "ipo", ipo)
    kto = {"beta": 0.5, "desirable_weight": 0.8, "undesirable_weight": 1.5}
    configs["kto"] = world.config(folder / "kto", training_of("KTO", kto=kto, prompts_per_step=2))
    asked = lenient(min_length_controlled_win_rate=0.0, max_kl=1e-6)
    configs["asked"] = world.config(folder / "asked", training_of("KTO"), **{**judged["KTO"], "evaluation": asked})
    unjudged = lenient(min_length_controlled_win_rate=0.5, max_kl=1e6)
    configs["unjudged"] = world.config(folder / "unjudged", training_of("SFT"), evaluation=unjudged)
    return configs


def steps_of(result: dict[str, Any]) -> list[dict[str, float]]:
    path = Path(result["artifact"]["path"]).parent / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def lenient(**changes: Any) -> Evaluation:
    return Evaluation(min_win_rate=0.0, samples=16, **changes)


@pytest.fixture(scope="module")
def attempts(offline_world: OfflineWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("offline-attempts")
    two = {
        f"{name}-ranks2": offline_world.config(
            folder / f"{name}-2", training_of(name, micro_batch_size=2, **changes), 2
        )
        for name, changes in OFFLINE.items()
    }
    return run_attempts(folder / "one", 1, variants(offline_world, folder)) | run_attempts(folder / "two", 2, two)


@pytest.mark.parametrize("family", OFFLINE)
def test_sharding_ranks_and_accumulation_do_not_change_what_is_learnt(attempts: dict[str, Any], family: str) -> None:
    """Two ranks also accumulate over micro batches of two rows. Order of summation differs, so weights agree within a
    tolerance far below one update (0.01)."""
    expected = attempts[f"{family}-zero0"]
    for result in (attempts[f"{family}-{label}"] for label in ("zero2", "ranks2")):
        assert result["failureClass"] == FailureClass.SUCCESS, result["message"]
        for key, tensor in weights(result).items():
            torch.testing.assert_close(tensor, weights(expected)[key], atol=2e-4, rtol=0)
        for name in ("loss", "entropy", "responseLength"):
            assert result["metrics"][name] == pytest.approx(expected["metrics"][name], abs=1e-4), name


@pytest.mark.parametrize("family", OFFLINE)
def test_two_halves_of_a_run_are_the_whole_run_bit_for_bit(attempts: dict[str, Any], family: str) -> None:
    whole, half, rest = (attempts[f"{family}-{label}"] for label in ("zero2", "half", "rest"))
    assert (half["failureClass"], half["step"]) == (FailureClass.GUARDRAIL_PAUSED, 2)
    assert rest["resumedFrom"]["step"] == 2
    assert rest["artifact"]["digest"] == whole["artifact"]["digest"]


@pytest.mark.parametrize("family", ["DPO", "KTO"])
def test_attempts_of_a_run_share_the_reference_log_probabilities(attempts: dict[str, Any], family: str) -> None:
    run_folder = Path(attempts[f"{family}-rest"]["artifact"]["path"]).parent.parent
    assert len(list((run_folder / "reference-logprobs").iterdir())) == 1


@pytest.mark.parametrize("family", OFFLINE)
def test_training_moves_the_policy(attempts: dict[str, Any], offline_world: OfflineWorld, family: str) -> None:
    """Negative control for the comparisons: the base differs by much more than their tolerance."""
    base = load_file(offline_world.policy.base / "model.safetensors")
    trained = weights(attempts[f"{family}-zero2"])
    assert max(float((tensor - base[key]).abs().max()) for key, tensor in trained.items()) > 0.01


def test_what_there_is_no_judge_for_gets_no_verdict(attempts: dict[str, Any]) -> None:
    assert attempts["DPO-zero2"]["verdicts"] == []
    assert "winRate" not in attempts["DPO-zero2"]["metrics"]
    assert attempts["DPO-zero2"]["metrics"]["evaluationKl"] > 0
    (win_rate,) = attempts["KTO-zero2"]["verdicts"]
    assert "judged by the audit reward model" in win_rate["message"]
    length, kl = attempts["unjudged"]["verdicts"]
    assert (length["metric"], length["state"], kl["state"]) == ("lengthControlledWinRate", "Unknown", "Pass")
    assert "name one" in length["message"]
    assert "lower" not in length


def test_what_is_asked_of_length_and_kl_is_answered_with_an_interval(attempts: dict[str, Any]) -> None:
    result = attempts["asked"]
    _, length, kl = result["verdicts"]
    assert "at equal length, judged by the audit reward model" in length["message"]
    assert (length["metric"], length["state"], length["n"]) == ("lengthControlledWinRate", "Pass", 16)
    assert length["lower"] < length["estimate"] == result["metrics"]["lengthControlledWinRate"] < length["upper"]
    assert (kl["metric"], kl["threshold"], kl["n"]) == ("evaluationKl", 1e-6, 16)
    assert kl["state"] == ("Fail" if kl["lower"] > 1e-6 else "NeedMoreData")
    assert kl["estimate"] == pytest.approx(result["metrics"]["evaluationKl"])
    assert kl["lower"] < kl["estimate"] < kl["upper"]


def test_a_student_is_judged_against_its_teacher(attempts: dict[str, Any]) -> None:
    (win_rate,) = attempts["Distillation-zero2"]["verdicts"]
    assert win_rate["metric"] == "nonInferiority"
    assert "against its teacher, judged by the audit reward model" in win_rate["message"]
    assert {"teacher", "prompts", "policy"} < set(attempts["Distillation-zero2"]["lineage"])


def test_reported_figures_are_those_of_the_algorithm(attempts: dict[str, Any]) -> None:
    dpo = attempts["DPO-zero2"]["metrics"]
    assert dpo["rewardMargin"] == pytest.approx(dpo["chosenReward"] - dpo["rejectedReward"])
    assert "kl" not in dpo, "the better responses are the data's: their mean log-ratio is no KL"
    assert attempts["Distillation-zero2"]["metrics"]["onPolicyShare"] == 0.5
    assert attempts["sequence"]["metrics"]["onPolicyShare"] == 0.0
    assert "divergence" not in attempts["sequence"]["metrics"]
    assert {metric.value for metric in REPORTED[Algorithm.DISTILLATION]} <= attempts["sequence"]["metrics"].keys()
    assert attempts["KTO-zero2"]["metrics"]["referencePoint"] >= 0.0


def test_an_unchanged_policy_prefers_neither_response(attempts: dict[str, Any]) -> None:
    first = steps_of(attempts["DPO-zero0"])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (first["chosenReward"], first["rewardMargin"]) == pytest.approx((0.0, 0.0), abs=1e-4)
    assert first["gradientNorm"] > 1e-3
    assert steps_of(attempts["KTO-zero0"])[0]["referencePoint"] == pytest.approx(0.0, abs=1e-4)


def test_ipo_and_its_smoothing_reach_the_loss(attempts: dict[str, Any]) -> None:
    """One pair a step, a tenth of it flipped: the margins wanted are 1 / (2 tau) and its negative."""
    for step in steps_of(attempts["ipo"]):
        margin = step["rewardMargin"] / 0.2
        assert step["loss"] == pytest.approx(0.9 * (margin - 2.5) ** 2 + 0.1 * (margin + 2.5) ** 2, rel=1e-5)
    assert abs(margin) > 0.1


def test_the_settings_of_kto_reach_the_loss(attempts: dict[str, Any]) -> None:
    """Where one of a step's two responses was good, the other bad, and the policy had moved."""
    both = [step for step in steps_of(attempts["kto"])[1:] if step["chosenReward"] and step["rejectedReward"]]
    for step in both:
        point = 0.5 * step["referencePoint"]
        good = 0.8 * (1 - sigmoid(step["chosenReward"] - point))
        bad = 1.5 * (1 - sigmoid(point - step["rejectedReward"]))
        assert step["loss"] == pytest.approx((good + bad) / 2, rel=1e-5)
    assert both


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
