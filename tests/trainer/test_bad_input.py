"""Everything a user can get wrong ends with exit 11 and one line that says what, where and what to do instead.

A damaged checkpoint does not: a run goes on from the one before, as ``test_checkpoint`` shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedModel

from rlhf_trainer import launch
from rlhf_trainer.attempt import read_config
from rlhf_trainer.distributed import World, join
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.models.policy import load_policy
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.preflight import check_attempt
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig, ExitCode, FailureClass, Result
from rlhf_trainer.worker import load_loop, run_attempt
from tests.trainer import bad_attempts
from tests.trainer.bad_suites import SUITES
from tests.trainer.bench import Bench, policy_training
from tests.trainer.offline_world import OfflineWorld, make_offline_world
from tests.trainer.training_world import TinyWorld

ATTEMPTS = bad_attempts.ATTEMPTS | SUITES


@pytest.fixture(scope="module")
def world() -> World:
    return join(timedelta(seconds=60))


@pytest.fixture(scope="module")
def texts(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> OfflineWorld:
    return make_offline_world(tmp_path_factory.mktemp("bad-input"), tiny_world)


@pytest.fixture
def bench(tiny_world: TinyWorld, texts: OfflineWorld, tmp_path: Path) -> Bench:
    return Bench(tiny_world, texts, tmp_path)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that weights have been loaded from since the test began."""
    found: list[str] = []
    plain = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def recorded(kind: type[PreTrainedModel], folder: Any, *rest: Any, **options: Any) -> Any:
        found.append(str(folder))
        return plain(kind, folder, *rest, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(recorded))
    return found


@pytest.fixture(autouse=True)
def _no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STATUS_PORT", "0")


def test_the_tables_are_long_enough() -> None:
    assert len(ATTEMPTS) >= 90
    assert len(FILES) >= 10


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_bad_attempt_ends_with_exit_11_and_one_line(bench: Bench, world: World, loaded: list[str], name: str) -> None:
    spoil, words = ATTEMPTS[name]
    config = spoil(bench)
    kept = bench.folder / "out" / "a1" / "earlier.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("written before")
    config = AttemptConfig.model_validate_json(config.to_json())
    result = run_attempt(config, load_loop(config.kind), world, RankFiles(bench.folder, 0), StopSignal())
    result = Result.model_validate_json(result.to_json())  # as the launcher reads it
    assert (result.failure_class, result.exit_code) == (FailureClass.INVALID, ExitCode.INVALID), result.message
    assert "\n" not in result.message
    assert len(result.message) < 1500
    missing = [word for word in words if word not in result.message]
    assert not missing, result.message
    assert kept.read_text() == "written before"
    assert result.artifact is None
    assert not loaded, "found before any weight is loaded"


def test_the_benches_are_sound(bench: Bench) -> None:
    """Negative control: unspoilt, every attempt passes all that the table trips over before weights are loaded."""
    offline = (bench.offline(algorithm) for algorithm in ("DPO", "KTO", "SFT", "Distillation"))
    for config in (bench.reward(), bench.policy(), *offline):
        check_attempt(config)


def test_loading_weights_would_be_seen(bench: Bench, loaded: list[str]) -> None:
    """Negative control: this is how policies, teachers and the members of a reward model are loaded."""
    load_policy(bench.tiny.base)
    load_reward_model(bench.policies.reward_model)
    members = [str(bench.policies.reward_model / "members" / name) for name in "01"]
    assert loaded == [str(bench.tiny.base), *members]


def spoilt(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def write(document: dict[str, Any]) -> str:
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            inner = document
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        return json.dumps(document)

    return write


# The attempt's own file: what the operator wrote, or a person by hand.
FILES: dict[str, tuple[Callable[[dict[str, Any]], str], tuple[str, ...]]] = {
    "empty": (lambda _: "", ("attempt.json",)),
    "not JSON": (lambda _: "{", ("attempt.json",)),
    "a list": (lambda _: "[]", ("attempt.json", "the document")),
    "kind": (spoilt(kind="DreamJob"), ("attempt.json", "kind")),
    "attempt a text": (spoilt(attempt="first"), ("attempt.json", "attempt")),
    "misspelt field": (
        spoilt(rewardModelTraining__learningrate=0.1),
        ("rewardModelTraining.learningrate", "did you mean 'learningRate'"),
    ),
    "misspelt inner field": (
        spoilt(rewardModelTraining__deepspeed__zero_Stage=1),
        ("deepspeed.zero_Stage", "did you mean 'zeroStage'"),
    ),
    "unknown field": (spoilt(rewardModelTraining__sparkle=1), ("rewardModelTraining.sparkle", "known are")),
    "rate a text": (spoilt(rewardModelTraining__learningRate="fast"), ("learningRate", "number")),
    "rate negative": (spoilt(rewardModelTraining__learningRate=-1), ("learningRate", "greater than 0")),
    "stage 4": (spoilt(rewardModelTraining__deepspeed__zeroStage=4), ("zeroStage", "less than or equal to 3")),
    "keep none": (spoilt(checkpoints__keepLast=0), ("checkpoints.keepLast", "greater than or equal to 1")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_attempt_file_ends_the_launcher_with_exit_11(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, words = FILES[name]
    path, said = bench.folder / "attempt.json", bench.folder / "termination-log"
    path.write_text(write(json.loads(bench.reward().to_json())))
    monkeypatch.setenv("RLHF_ATTEMPT_CONFIG", str(path))
    monkeypatch.setenv("RLHF_TERMINATION_LOG", str(said))
    assert launch.main() == ExitCode.INVALID
    result = Result.model_validate_json(said.read_bytes())
    assert (result.failure_class, result.exit_code) == (FailureClass.INVALID, ExitCode.INVALID)
    assert "\n" not in result.message
    missing = [word for word in (*words, str(path)) if word not in result.message]
    assert not missing, result.message


def test_a_sound_file_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.folder / "attempt.json"
    path.write_text(bench.reward().to_json())
    monkeypatch.setenv("RLHF_ATTEMPT_CONFIG", str(path))
    assert read_config() == bench.reward()


def test_kl_with_a_wrong_gradient_is_no_configuration() -> None:
    with pytest.raises(ValidationError, match="wrong gradient"):
        policy_training(kl={"placement": "loss", "estimator": "k1"})
