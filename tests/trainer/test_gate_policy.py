"""Preflight and watch in whole policy attempts: refused before training, stopped, resumed, best look published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_trainer.checkpoint import checkpoint_path, newest_verified, read_manifest
from rlhf_trainer.config import BestOfNPreflight, Checkpoints, Evaluation, GuardrailAction, OverOptimization
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.wire import AttemptConfig, ExitCode, FailureClass, Located, Result, VerdictState
from tests.trainer.attempts import run_here, run_on
from tests.trainer.ppo_world import PolicyWorld, make_policy_world, training_of
from tests.trainer.test_checkpoint import damage
from tests.trainer.training_world import TinyWorld, write_rows

STEPS, MANY = 6, 24
WATCH = OverOptimization(every_steps=2, samples=32, patience=2, max_gap=50.0)


@pytest.fixture(scope="module")
def policy_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("policy-world"), tiny_world)


def config(world: PolicyWorld, output: Path, evaluation: Evaluation, attempt: int = 1, **changes: Any) -> AttemptConfig:
    steps, sharding = changes.pop("steps", STEPS), changes.pop("deepspeed", {"zero_stage": 0})
    kl = {"coefficient": 0.0, "controller": "fixed"}
    never = [{"cost": "length", "limit": 1000.0}]  # its price stays 0; it is there to be kept
    training = training_of(
        steps=steps, prompts_per_step=16, deepspeed=sharding, learning_rate=0.03, kl=kl, constraints=never
    )
    every = Checkpoints(every_steps=2, keep_last=10)
    return world.config(output, training=training, evaluation=evaluation, attempt=attempt, checkpoints=every, **changes)


def watched(**changes: Any) -> Evaluation:
    return Evaluation(
        min_win_rate=0.0, samples=16, over_optimization=OverOptimization(**{**WATCH.model_dump(), **changes})
    )


@pytest.fixture(scope="module")
def turned(policy_world: PolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Located:
    """An audit that is the reward itself with its sign turned: whatever the policy gains, the audit loses."""
    folder = tmp_path_factory.mktemp("audit") / "turned"
    shutil.copytree(policy_world.reward_model, folder)
    for path in folder.glob("members/*/model.safetensors"):
        weights = load_file(path)
        save_file(weights | {"score.weight": -weights["score.weight"]}, path, metadata={"format": "pt"})
    return Located(path=str(folder))


@pytest.fixture(scope="module")
def whole(policy_world: PolicyWorld, turned: Located, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("watched")
    return output, run_here(config(policy_world, output, watched(), audit_reward_model=turned))


def looks(output: Path) -> list[int]:
    """Steps after which there was a look, from the attempt's history."""
    rows = [json.loads(line) for line in (output / "a1" / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "auditShift" in row]


def test_looks_come_when_due_and_are_reported(whole: tuple[Path, Result]) -> None:
    output, result = whole
    assert result.failure_class is FailureClass.SUCCESS, result.message
    assert looks(output) == [2, 4, 6]
    assert {"proxyShift", "auditShift", "auditGap"} <= set(result.metrics)
    (verdict,) = [v for v in result.verdicts if v.metric == "overOptimization"]
    assert (verdict.state, verdict.n, verdict.threshold) == (VerdictState.PASS, 15, 50.0), "each held-out prompt once"


def test_the_best_look_is_what_is_published(whole: tuple[Path, Result]) -> None:
    output, result = whole
    state = json.loads((output / "a1/checkpoints/step-00000006/oversight/state.json").read_text())
    best = state["detector"]["best"]["step"]
    saved = torch.load(
        output / f"a1/checkpoints/step-{best:08d}/engine/engine/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    assert result.artifact is not None
    published = load_file(Path(result.artifact.path) / "model.safetensors")
    for name, tensor in published.items():
        torch.testing.assert_close(tensor, saved[f"lm.{name}"].float(), atol=0, rtol=0)
    assert best < STEPS, "this seed's audit likes an earlier look best, so that the test can tell"


STATE = (
    "engine/model",  # at ZeRO stage 0 with the optimiser's state; test_checkpoint has one of its own
    "klController",
    "constraints",
    "dataPosition",
    "guardrails",
    "random",
    "oversight",
    "bestWeights",
)


def test_a_checkpoint_holds_all_state_that_steps_change(whole: tuple[Path, Result]) -> None:
    manifest = read_manifest(whole[0] / "a1/checkpoints/step-00000004")
    assert {entry.component for entry in manifest.files.values()} == set(STATE)


@pytest.mark.parametrize("component", STATE)
def test_each_part_of_the_state_is_missed_by_name(whole: tuple[Path, Result], tmp_path: Path, component: str) -> None:
    """One bit of it, then the file: the run would go on from the checkpoint before."""
    output, _ = whole
    for step in (2, 4):
        name = f"a1/checkpoints/step-{step:08d}"
        shutil.copytree(output / name, tmp_path / name)
    manifest = read_manifest(checkpoint_path(tmp_path, 1, 4))
    victim = next(path for path, entry in manifest.files.items() if entry.component == component)
    for spoil in (damage, Path.unlink):
        spoil(checkpoint_path(tmp_path, 1, 4) / victim)
        found, (skipped,) = newest_verified(tmp_path, manifest.config_digest)
        assert found is not None
        assert (found.manifest.step, skipped.step) == (2, 4)
        assert skipped.reason.startswith(f"component '{component}': {victim} ")


def test_two_ranks_with_sharded_weights_see_the_same(
    policy_world: PolicyWorld, turned: Located, whole: tuple[Path, Result], tmp_path: Path
) -> None:
    """ZeRO-3 on two ranks: the looks are shared out, the best weights gathered, the judged model sent round."""
    shared = config(
        policy_world, tmp_path / "out", watched(), world_size=2, deepspeed={"zero_stage": 3}, audit_reward_model=turned
    )
    result = run_on(2, tmp_path / "ranks", shared)
    assert result.failure_class is FailureClass.SUCCESS, result.message
    alone = {verdict.metric: verdict for verdict in whole[1].verdicts}
    for verdict in result.verdicts:
        assert verdict.n == alone[verdict.metric].n
        assert verdict.estimate == pytest.approx(alone[verdict.metric].estimate, abs=0.02)
    assert result.artifact is not None
    assert whole[1].artifact is not None
    ours, theirs = (load_file(Path(at.path) / "model.safetensors") for at in (result.artifact, whole[1].artifact))
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], atol=1e-3, rtol=0, msg=name)


def test_without_selection_the_last_weights_are_published(
    policy_world: PolicyWorld, turned: Located, whole: tuple[Path, Result], tmp_path: Path
) -> None:
    result = run_here(config(policy_world, tmp_path, watched(select_best=False), audit_reward_model=turned))
    assert result.artifact is not None
    assert whole[1].artifact is not None
    assert result.artifact.digest != whole[1].artifact.digest
    assert not (tmp_path / "a1/checkpoints/step-00000006/bestWeights").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_publishes_the_same(
    policy_world: PolicyWorld, turned: Located, whole: tuple[Path, Result], tmp_path: Path, step: int
) -> None:
    """Killed after any checkpoint: the looks before it, the base's scores and the best weights come from it."""
    output, result = whole
    name = f"a1/checkpoints/step-{step:08d}"
    shutil.copytree(output / name, tmp_path / name)
    resumed = run_here(config(policy_world, tmp_path, watched(), attempt=2, audit_reward_model=turned))
    assert resumed.resumed_from is not None
    assert resumed.resumed_from.step == step
    assert resumed.artifact is not None
    assert result.artifact is not None
    assert resumed.artifact.digest == result.artifact.digest
    assert resumed.verdicts == result.verdicts
    assert resumed.metrics["auditGap"] == result.metrics["auditGap"]


@pytest.mark.parametrize(
    ("action", "failure", "code"),
    [
        (GuardrailAction.STOP, FailureClass.GUARDRAIL_STOPPED, ExitCode.GUARDRAIL_STOPPED),
        (GuardrailAction.PAUSE, FailureClass.GUARDRAIL_PAUSED, ExitCode.GUARDRAIL_PAUSED),
    ],
)
def test_a_gap_ends_the_run_as_configured(
    policy_world: PolicyWorld,
    turned: Located,
    tmp_path: Path,
    action: GuardrailAction,
    failure: FailureClass,
    code: ExitCode,
) -> None:
    evaluation = watched(max_gap=0.3, action=action, samples=64)
    result = run_here(config(policy_world, tmp_path, evaluation, steps=MANY, audit_reward_model=turned))
    assert result.failure_class is failure, result.message
    assert result.exit_code == code
    assert "maxGap is 0.3" in result.message or "the audit fell by" in result.message
    assert result.checkpoint is not None
    assert result.checkpoint.step == result.step < MANY


def test_an_alert_lets_the_run_go_on_and_the_verdict_speaks(
    policy_world: PolicyWorld, turned: Located, tmp_path: Path
) -> None:
    evaluation = watched(max_gap=0.3, samples=64, select_best=False)
    more = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt.text} for prompt in every_prompt()[::7]])
    attempt = config(
        policy_world, tmp_path, evaluation, steps=MANY, audit_reward_model=turned, prompts=Located(path=str(more))
    )
    result = run_here(attempt)
    assert result.step == MANY
    assert (result.failure_class, result.reason) == (FailureClass.GATE_FAILED, "EvaluationGateFailed")
    (verdict,) = [v for v in result.verdicts if v.metric == "overOptimization"]
    assert verdict.state is VerdictState.FAIL


def test_a_reward_the_audit_disagrees_with_is_refused_before_training(
    policy_world: PolicyWorld, tmp_path: Path
) -> None:
    """Two random reward models: best of n by one is worth nothing to the other."""
    evaluation = Evaluation(
        min_win_rate=0.0, samples=16, best_of_n=BestOfNPreflight(samples_per_prompt=8, prompts=8, min_lift=3.0)
    )
    result = run_here(config(policy_world, tmp_path, evaluation))
    assert (result.failure_class, result.exit_code) == (FailureClass.GATE_FAILED, ExitCode.GATE_FAILED)
    assert result.reason == "BestOfNFailed"
    assert "bestOfNLift Fail" in result.message
    assert "nothing was trained" in result.message
    assert (result.step, result.checkpoint, result.artifact) == (0, None, None)
    assert [verdict.metric for verdict in result.verdicts] == ["bestOfNLift", "bestOfNLiftRatio"]


def test_a_preflight_that_passes_lets_training_begin(policy_world: PolicyWorld, tmp_path: Path) -> None:
    easy = BestOfNPreflight(samples_per_prompt=4, prompts=8, min_lift=-10.0, min_lift_ratio=0.0)
    evaluation = Evaluation(min_win_rate=0.0, samples=16, best_of_n=easy)
    audit = tmp_path / "audit"
    shutil.copytree(policy_world.reward_model, audit)
    (audit / "calibration.json").write_text((audit / "calibration.json").read_text() + " ")  # another digest
    result = run_here(config(policy_world, tmp_path / "out", evaluation, audit_reward_model=Located(path=str(audit))))
    assert result.failure_class is FailureClass.SUCCESS, result.message
    assert result.step == STEPS
    lift, ratio, _ = result.verdicts
    assert (lift.state, ratio.state, lift.n) == (VerdictState.PASS, VerdictState.PASS, 8)
    # A model that agrees with the reward keeps all of its lift, but for the ensemble penalty.
    assert ratio.estimate == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("asked", [{"best_of_n": BestOfNPreflight()}, {"over_optimization": WATCH}])
def test_no_audit_is_named(policy_world: PolicyWorld, tmp_path: Path, asked: dict[str, Any]) -> None:
    result = run_here(config(policy_world, tmp_path, Evaluation(samples=16, **asked), audit_reward_model=None))
    assert result.failure_class is FailureClass.INVALID
    assert "needs spec.auditRewardModel" in result.message


@pytest.mark.parametrize("whose", ["reward_model", "audit_reward_model"])
def test_a_reward_model_of_another_tokenizer_is_refused(policy_world: PolicyWorld, tmp_path: Path, whose: str) -> None:
    """Before any weight is loaded: words that mean other tokens would be scored as other text."""
    other = tmp_path / "other"
    shutil.copytree(getattr(policy_world, "reward_model" if whose == "reward_model" else "audit"), other)
    document = json.loads((other / "calibration.json").read_text())
    document["formatting"]["tokenizer"] = "sha256:" + "0" * 64
    (other / "calibration.json").write_text(json.dumps(document))
    result = run_here(
        config(policy_world, tmp_path / "out", Evaluation(samples=16), **{whose: Located(path=str(other))})
    )
    assert result.failure_class is FailureClass.INVALID
    assert "the policy's tokenizer lays it out otherwise: tokenizer" in result.message
