"""Real launches: torchrun, DeepSpeed, signals and files, as in a pod, and how each of them ends."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trainer.checkpoint import checkpoint_path
from rlhf_trainer.config import Checkpoints
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.wire import FailureClass, Located, Result, StatusReport
from tests.trainer.test_checkpoint import damage
from tests.trainer.training_world import TinyWorld, launched, preference_rows, training_of, write_rows


def run_config(world: TinyWorld, output: Path, attempt: int = 1) -> Any:
    """Two ranks, a checkpoint after every step, so that an interruption always finds one behind it."""
    return world.config(output, 2, attempt=attempt, checkpoints=Checkpoints(every_steps=1, keep_last=4))


@pytest.fixture(scope="module")
def undisturbed(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run from start to end, watched through its endpoints while it trains."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launched(run_config(tiny_world, folder / "out"), folder) as launch:
        launch.until_step(2)
        status = urllib.request.urlopen(f"http://127.0.0.1:{launch.status_port}/status", timeout=10).read()
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{launch.status_port}/metrics", timeout=10).read()
        code = launch.wait()
        assert code == 0, launch.output()
        return {"result": launch.message(), "status": status, "metrics": metrics.decode(), "out": folder / "out"}


def test_message_result_file_and_exit_code_agree(undisturbed: dict[str, Any]) -> None:
    result: Result = undisturbed["result"]
    whole = Result.model_validate_json((undisturbed["out"] / "a1" / "result.json").read_bytes())
    assert whole == result
    assert (result.failure_class, result.exit_code) == (FailureClass.SUCCESS, 0)
    assert {verdict.metric for verdict in result.verdicts} == {"accuracy", "calibrationError"}
    assert set(result.lineage) == {"baseModel", "preferences", "config"}
    assert result.checkpoint is not None
    assert result.checkpoint.step == result.step > 8


def test_status_and_metrics_while_training(undisturbed: dict[str, Any]) -> None:
    status = StatusReport.model_validate_json(undisturbed["status"])
    assert (status.world_size, status.attempt, status.total_steps) == (2, 1, undisturbed["result"].step)
    assert status.step >= 2
    assert status.checkpoints
    samples = dict(line.rsplit(" ", 1) for line in undisturbed["metrics"].splitlines() if not line.startswith("#"))
    assert float(samples["rlhf_trainer_step"]) >= 2
    assert float(samples["rlhf_trainer_loss"]) > 0
    assert float(samples["rlhf_trainer_heartbeat_timestamp_seconds"]) > 1.7e9
    assert samples['rlhf_trainer_phase{phase="Training"}'] in {"0.0", "1.0"}


def test_the_artifact_is_what_its_manifest_says_and_loads_anywhere(undisturbed: dict[str, Any]) -> None:
    artifact = Path(undisturbed["result"].artifact.path)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["digest"] == undisturbed["result"].artifact.digest
    prompts, responses = ["hello refund", "hello refund parcel"], ["glad happy", "harsh cold stern glad"]
    scorer = load_reward_model(artifact)
    mean, spread = scorer(prompts, responses)
    alone = [float(scorer([prompt], [response])[0]) for prompt, response in zip(prompts, responses, strict=True)]
    assert mean.tolist() == pytest.approx(alone, abs=1e-5), "padding must not change a score"
    assert (spread > 0).all()
    # The members are ordinary Hugging Face folders: the library's own head agrees on the raw scores.
    raw = []
    for member in sorted((artifact / "members").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(member)
        texts = [[*tokenizer(p).input_ids, *tokenizer(r, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                 for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
        batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with torch.no_grad():
            raw.append(AutoModelForSequenceClassification.from_pretrained(member)(**batch).logits[:, 0])
    expected, _ = scorer.calibration.apply(torch.stack(raw))
    assert mean.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_killed_and_corrupted_it_still_ends_the_same(
    undisturbed: dict[str, Any], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """SIGKILL one rank, damage the newest checkpoint: the next attempt starts from the one before, and says so."""
    with launched(run_config(tiny_world, tmp_path / "out"), tmp_path / "1") as first:
        first.until_step(3)
        os.kill(first.ranks()[1].pid, signal.SIGKILL)
        assert first.wait() == 1, first.output()
    killed = first.message()
    assert killed.failure_class is FailureClass.UNKNOWN
    assert "rank 1 was killed" in killed.message
    assert killed.checkpoint is not None
    newest = killed.checkpoint.step
    damage(next(checkpoint_path(tmp_path / "out", 1, newest).glob("engine/engine/*rank_1*optim_states.pt")))
    with launched(run_config(tiny_world, tmp_path / "out", attempt=2), tmp_path / "2") as second:
        assert second.wait() == 0, second.output()
    result = second.message()
    assert result.resumed_from is not None
    assert result.resumed_from.step == newest - 1
    assert [skipped.step for skipped in result.skipped_checkpoints] == [newest]
    assert "component 'engine/optimizer'" in result.skipped_checkpoints[0].reason
    assert result.artifact is not None
    assert result.artifact.digest == undisturbed["result"].artifact.digest


def test_sigterm_saves_exits_20_and_resumes_to_the_same_end(
    undisturbed: dict[str, Any], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    with launched(run_config(tiny_world, tmp_path / "out"), tmp_path / "1") as first:
        first.until_step(2)
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 20, first.output()
    stopped = first.message()
    assert stopped.failure_class is FailureClass.PREEMPTED
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.step == stopped.step < undisturbed["result"].step
    with launched(run_config(tiny_world, tmp_path / "out", attempt=2), tmp_path / "2") as second:
        assert second.wait() == 0, second.output()
    result = second.message()
    assert result.resumed_from == stopped.checkpoint
    assert result.artifact is not None
    assert result.artifact.digest == undisturbed["result"].artifact.digest


def _bad_row(folder: Path) -> Any:
    rows = preference_rows(40, seed=2)
    rows[6]["preference"] = "left"
    return Located(path=str(write_rows(folder / "bad.jsonl", rows)))


def _wild_base(world: TinyWorld, folder: Path) -> Located:
    """A base model whose weights overflow float32 in the first forward."""
    model = AutoModelForCausalLM.from_pretrained(world.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)
    model.save_pretrained(folder / "wild")
    AutoTokenizer.from_pretrained(world.base).save_pretrained(folder / "wild")
    return Located(path=str(folder / "wild"))


def test_attempts_that_cannot_succeed(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Started together: malformed rows, a changed digest, a divergence, a node that never comes, a rank that hangs
    while its peer waits for it, a rank that cannot save within the grace period."""
    changed = Located(path=str(tiny_world.preferences), digest="sha256:" + "0" * 64)
    configs = {
        "bad row": tiny_world.config(tmp_path / "o1", preferences=_bad_row(tmp_path)),
        "digest": tiny_world.config(tmp_path / "o2", preferences=changed),
        "diverged": tiny_world.config(tmp_path / "o3", base_model=_wild_base(tiny_world, tmp_path)),
        "rendezvous": tiny_world.config(tmp_path / "o4", 2, rendezvous_seconds=5),
        "hang": tiny_world.config(tmp_path / "o5", 2, training=training_of(epochs=100)),
        "no time": tiny_world.config(tmp_path / "o6", training=training_of(epochs=100), grace_seconds=5),
    }
    with ExitStack() as stack:
        launches = {
            name: stack.enter_context(launched(config, tmp_path / name, nodes=2 if name == "rendezvous" else 1))
            for name, config in configs.items()
        }
        launches["hang"].until_step(2)
        launches["hang"].freeze(1)  # rank 0 then waits in a collective
        launches["no time"].until_step(2)
        os.kill(launches["no time"].ranks()[0].pid, signal.SIGSTOP)
        launches["no time"].process.send_signal(signal.SIGTERM)
        codes = {name: launch.wait() for name, launch in launches.items()}
        logs = "\n".join(launch.output()[-800:] for launch in launches.values())
    expected = {"bad row": 11, "digest": 11, "diverged": 12, "rendezvous": 21, "hang": 22, "no time": 20}
    assert codes == expected, logs
    results = {name: launch.message() for name, launch in launches.items()}
    assert "bad.jsonl:7: field 'preference' is 'left', not one of a, b, tie" in results["bad row"].message
    assert results["digest"].reason == "DigestMismatch"
    assert "preferences.jsonl" in results["digest"].message
    assert results["diverged"].failure_class is FailureClass.DIVERGED
    assert results["rendezvous"].failure_class is FailureClass.RENDEZVOUS
    assert results["hang"].failure_class is FailureClass.NO_PROGRESS
    assert "no checkpoint within 5 s; raise the grace period" in results["no time"].message
    assert results["no time"].checkpoint is not None
    assert results["hang"].checkpoint is not None, "where to resume from is known even of a hung attempt"
