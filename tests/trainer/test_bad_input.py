"""Everything a user can get wrong ends with exit 11 and one line that says what, where and what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_trainer.attempt import read_config
from rlhf_trainer.checkpoint_store import CheckpointStore
from rlhf_trainer.config import Checkpoints
from rlhf_trainer.distributed import World, join
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.preflight import check_attempt
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig, ExitCode, FailureClass, Located
from rlhf_trainer.worker import load_loop, run_attempt
from tests.trainer import ppo_world, training_world
from tests.trainer.ppo_world import PolicyWorld, make_policy_world
from tests.trainer.training_world import TinyWorld, preference_rows, write_rows

Edit = Callable[["Bench"], AttemptConfig]


@dataclass
class Bench:
    """A sound reward-model attempt and a sound policy attempt, and ways to spoil them."""

    tiny: TinyWorld
    policies: PolicyWorld
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)

    def reward(self, **changes: Any) -> AttemptConfig:
        return self.tiny.config(self.folder / "out", **changes)

    def policy(self, **changes: Any) -> AttemptConfig:
        return self.policies.config(self.folder / "out", **changes)

    def lines(self, text: str | bytes) -> Located:
        path = self.folder / "data.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Located(path=str(path))

    def row(self, **changes: Any) -> Located:
        """Sound preferences but for row 3; None takes a field away."""
        rows = preference_rows(60, seed=4)
        rows[2] = {key: value for key, value in {**rows[2], **changes}.items() if value is not None}
        return Located(path=str(write_rows(self.folder / "data.jsonl", rows)))

    def model(self, spoil: Callable[[Path], None]) -> Located:
        copy = self.folder / "model"
        shutil.copytree(self.tiny.base, copy)
        spoil(copy)
        return Located(path=str(copy))

    def scorer(self, spoil: Callable[[Path], None], source: Path | None = None) -> Located:
        copy = self.folder / "scorer"
        shutil.copytree(source or self.policies.reward_model, copy)
        spoil(copy)
        return Located(path=str(copy))


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))

    return spoil


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: overwrite(name, (folder / name).read_bytes()[:-7])(folder)


def lineage(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"lineage": {"preferences": "sha256:" + "c" * 64}}))


def shared_lineage(bench: Bench) -> AttemptConfig:
    lineage(bench.policies.audit)
    try:
        return bench.policy(reward_model=bench.scorer(lineage), audit_reward_model=Located(path=str(_audit(bench))))
    finally:
        (bench.policies.audit / "manifest.json").unlink()


def _audit(bench: Bench) -> Path:
    return Path(shutil.copytree(bench.policies.audit, bench.folder / "audit"))


def template(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return spoil


NOT_A_PREFIX = "{% if messages | length == 1 %}hello{% else %}glad{% endif %}"


def rail(**changes: Any) -> dict[str, Any]:
    return {"guardrails": ({"metric": "kl", "above": 1.0, **changes},)}


def training(**changes: Any) -> Any:
    return training_world.training_of(**changes)


def policy_training(**changes: Any) -> Any:
    return ppo_world.training_of(**changes)


# name → (how the attempt is spoilt, words of its one line: what, where, remedy)
PREFERENCES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no file": (lambda b: b.reward(preferences=Located(path=str(b.folder / "gone.jsonl"))), ("gone.jsonl", "check")),
    "a folder": (lambda b: b.reward(preferences=Located(path=str(b.folder))), ("spec.preferences", "check the path")),
    "empty file": (lambda b: b.reward(preferences=b.lines("")), ("data.jsonl", "no rows", "check")),
    "blank lines": (lambda b: b.reward(preferences=b.lines("\n\n  \n")), ("data.jsonl", "no rows")),
    "not JSON": (lambda b: b.reward(preferences=b.lines('{"prompt": \n')), ("data.jsonl:1", "each line must be one")),
    "a list": (lambda b: b.reward(preferences=b.lines("[1]\n")), ("data.jsonl:1", "JSON list")),
    "a number": (lambda b: b.reward(preferences=b.lines("7\n")), ("data.jsonl:1", "each line must be one")),
    "NaN": (lambda b: b.reward(preferences=b.lines('{"a": NaN}\n')), ("data.jsonl:1", "NaN is not JSON")),
    "not UTF-8": (lambda b: b.reward(preferences=b.lines(b'{"prompt": "\xff\xfe"}\n')), ("data.jsonl:1", "UTF-8")),
    "binary": (lambda b: b.reward(preferences=b.lines(b"\x00\x01\x02\n")), ("data.jsonl:1",)),
    "deep nesting": (lambda b: b.reward(preferences=b.lines("[" * 100_000 + "\n")), ("data.jsonl:1",)),
    "no prompt": (lambda b: b.reward(preferences=b.row(prompt=None)), ("data.jsonl:3", "'prompt'", "missing")),
    "empty prompt": (lambda b: b.reward(preferences=b.row(prompt=" ")), ("data.jsonl:3", "'prompt'", "non-empty")),
    "prompt a number": (lambda b: b.reward(preferences=b.row(prompt=5)), ("data.jsonl:3", "'prompt'", "int")),
    "no response": (lambda b: b.reward(preferences=b.row(response_b=None)), ("data.jsonl:3", "response_b")),
    "response a list": (lambda b: b.reward(preferences=b.row(response_a=["x"])), ("data.jsonl:3", "response_a")),
    "unknown choice": (lambda b: b.reward(preferences=b.row(preference="left")), ("data.jsonl:3", "preference")),
    "choice missing": (lambda b: b.reward(preferences=b.row(preference=None)), ("data.jsonl:3", "preference")),
    "choice a number": (lambda b: b.reward(preferences=b.row(preference=1)), ("data.jsonl:3", "preference")),
    "same texts": (
        lambda b: b.reward(preferences=b.row(response_a="glad happy", response_b="glad  happy")),
        ("data.jsonl:3", "same text", "drop the row"),
    ),
    "chosen without rejected": (
        lambda b: b.reward(preferences=b.row(chosen="glad", response_a=None, response_b=None)),
        ("data.jsonl:3", "'rejected'"),
    ),
    "too few rows": (
        lambda b: b.reward(preferences=Located(path=str(write_rows(b.folder / "d.jsonl", preference_rows(9, 1))))),
        ("d.jsonl", "globalBatchSize", "lower it"),
    ),
    "all too long": (
        lambda b: b.reward(preferences=b.row(), training=training(max_length=8)),
        ("data.jsonl", "more than 8 tokens", "raise training.maxLength"),
    ),
    "score a text": (
        lambda b: b.reward(human_scores=b.lines('{"prompt": "hello", "response": "glad", "score": "high"}\n')),
        ("data.jsonl:1", "'score'", "finite number"),
    ),
    "score missing": (
        lambda b: b.reward(human_scores=b.lines('{"prompt": "hello", "response": "glad"}\n')),
        ("data.jsonl:1", "'score'"),
    ),
    "no human scores": (
        lambda b: b.reward(human_scores=Located(path=str(b.folder / "gone.jsonl"))),
        ("spec.validation.humanScores", "gone.jsonl"),
    ),
}

POLICY_DATA: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no prompts file": (lambda b: b.policy(prompts=Located(path=str(b.folder / "gone.jsonl"))), ("spec.prompts",)),
    "prompt missing": (lambda b: b.policy(prompts=b.lines('{"text": "hello"}\n')), ("data.jsonl:1", "'prompt'")),
    "prompts empty": (lambda b: b.policy(prompts=b.lines("")), ("data.jsonl", "no rows")),
    "one prompt": (lambda b: b.policy(prompts=b.lines('{"prompt": "hello"}\n')), ("data.jsonl", "more prompts")),
    "prompts too long": (
        lambda b: b.policy(training=policy_training(max_prompt_length=1)),
        ("prompts.jsonl", "more than 1 tokens", "maxPromptLength"),
    ),
    "no prompts field": (lambda b: b.policy(prompts=None), ("spec.prompts is missing", "JSONL")),
    "no policy field": (lambda b: b.policy(policy=None), ("policy", "recreate")),
    "no rewardModel field": (lambda b: b.policy(reward_model=None), ("spec.rewardModel is missing", "jobRef")),
}

MODELS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no folder": (lambda b: b.reward(base_model=Located(path=str(b.folder / "gone"))), ("spec.baseModel", "gone")),
    "a file": (
        lambda b: b.reward(base_model=Located(path=str(b.tiny.preferences))),
        ("spec.baseModel", "not a folder"),
    ),
    "no config": (lambda b: b.reward(base_model=b.model(remove("config.json"))), ("config.json", "Hugging Face")),
    "config not JSON": (
        lambda b: b.reward(base_model=b.model(overwrite("config.json", b"{"))),
        ("config.json", "JSON"),
    ),
    "config a list": (lambda b: b.reward(base_model=b.model(overwrite("config.json", b"[]"))), ("config.json", "list")),
    "no model type": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", model_type=...))),
        ("config.json", "model_type"),
    ),
    "unknown model type": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", model_type="sphinx"))),
        ("spec.baseModel", "sphinx"),
    ),
    "encoder-decoder": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", is_encoder_decoder=True))),
        ("config.json", "decoder-only"),
    ),
    "other vocabulary size": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", vocab_size=5000))),
        ("vocab_size 5000", "different models"),
    ),
    "no weights": (lambda b: b.reward(base_model=b.model(remove("model.safetensors"))), ("spec.baseModel", "weights")),
    "weights cut": (lambda b: b.reward(base_model=b.model(cut("model.safetensors"))), ("model.safetensors", "bytes")),
    "weights empty": (
        lambda b: b.reward(base_model=b.model(overwrite("model.safetensors", b""))),
        ("model.safetensors", "copy the model again"),
    ),
    "weights garbage": (
        lambda b: b.policy(policy=b.model(overwrite("model.safetensors", b"\xff" * 64))),
        ("spec.policy", "model.safetensors", "copy"),
    ),
    "shard missing": (
        lambda b: b.reward(
            base_model=b.model(
                overwrite("model.safetensors.index.json", b'{"weight_map": {"x": "model-00002.safetensors"}}')
            )
        ),
        ("model-00002.safetensors is missing", "copy the whole folder"),
    ),
    "no tokenizer": (
        lambda b: b.policy(policy=b.model(lambda f: (remove("tokenizer.json")(f), remove("tokenizer_config.json")(f)))),
        ("spec.policy", "tokenizer"),
    ),
    "tokenizer not JSON": (
        lambda b: b.reward(base_model=b.model(overwrite("tokenizer.json", b"{{"))),
        ("spec.baseModel", "no tokenizer can be loaded"),
    ),
    "pad is eos": (
        lambda b: b.reward(base_model=b.model(_pad_is_eos)),
        ("tokenizer_config.json", "pad_token is the eos_token", "one of its own"),
    ),
    "no pad": (
        lambda b: b.policy(policy=b.model(edit_json("tokenizer_config.json", pad_token=...))),
        ("tokenizer_config.json", "pad_token is not set"),
    ),
    "template not a prefix": (
        lambda b: b.reward(
            base_model=b.model(template("{% if messages | length == 1 %}hello{% else %}glad{% endif %}"))
        ),
        ("chat template", "prefix"),
    ),
    "template broken": (
        lambda b: b.reward(base_model=b.model(template("{% for %}"))),
        ("chat template cannot be rendered", "correct it"),
    ),
    "context too short": (
        lambda b: b.reward(base_model=b.model(edit_json("config.json", max_position_embeddings=8))),
        ("8 positions", "training.maxLength", "lower them"),
    ),
    "context too short for replies": (
        lambda b: b.policy(policy=b.model(edit_json("config.json", max_position_embeddings=20))),
        ("20 positions", "generation.maxNewTokens", "lower them"),
    ),
    "changed digest": (
        lambda b: b.reward(base_model=Located(path=str(b.tiny.base), digest="sha256:" + "0" * 64)),
        ("spec.baseModel", "is pinned", "pin the new digest"),
    ),
    "changed data digest": (
        lambda b: b.policy(prompts=Located(path=str(b.policies.prompts), digest="sha256:" + "0" * 64)),
        ("spec.prompts", "is pinned"),
    ),
    "no calibration": (
        lambda b: b.policy(reward_model=b.scorer(remove("calibration.json"))),
        ("calibration.json", "RewardModelJob"),
    ),
    "calibration broken": (
        lambda b: b.policy(reward_model=b.scorer(overwrite("calibration.json", b"{}"))),
        ("calibration.json", "RewardModelJob"),
    ),
    "other formatting": (
        lambda b: b.policy(reward_model=b.scorer(edit_json("calibration.json", formatting="chatml/v9"))),
        ("calibration.json", "chatml/v9"),
    ),
    "member missing": (
        lambda b: b.policy(reward_model=b.scorer(lambda f: shutil.rmtree(f / "members" / "1"))),
        ("not a complete reward model", "members/1"),
    ),
    "audit is the judged": (
        lambda b: b.policy(audit_reward_model=Located(path=str(b.policies.reward_model))),
        ("auditRewardModel is the same model", "other preferences"),
    ),
    "audit of the same preferences": (shared_lineage, ("auditRewardModel", "same preferences", "train it on other")),
    "no safety filter": (
        lambda b: b.policy(safety_filter=Located(path=str(b.folder / "gone.json"))),
        ("spec.evaluation.safetyFilter", "gone.json"),
    ),
}

CONFIGURATION: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "batch and ranks": (
        lambda b: b.policy(training=policy_training(prompts_per_step=9)),
        ("promptsPerStep is 9", "choose 8 or 10"),
    ),
    "micro batch": (
        lambda b: b.reward(training=training(micro_batch_size=5)),
        ("microBatchSize is 5", "16 rows", "choose 4 or 8"),
    ),
    "micro batch of rollouts": (
        lambda b: b.policy(training=policy_training(algorithm="GRPO", samples_per_prompt=3, micro_batch_size=5)),
        ("microBatchSize is 5", "12 rows", "choose 4 or 6"),
    ),
    "greedy sampling": (
        lambda b: b.policy(training=policy_training(generation={"max_new_tokens": 6, "temperature": 0.01})),
        ("generation.temperature", "choose at least"),
    ),
    "LoRA on nothing": (
        lambda b: b.reward(training=training(lora={"target_modules": ["q_prj"]})),
        ("lora.targetModules", "'q_prj'", "q_proj"),
    ),
    "guardrail never reported": (
        lambda b: b.reward(**rail(metric="reward")),
        ("spec.guardrails[0].metric is reward", "gradientNorm"),
    ),
    "guardrail without groups": (
        lambda b: b.policy(**rail(metric="zeroVarianceFraction")),
        ("guardrails[0].metric is zeroVarianceFraction", "choose one of"),
    ),
    "guardrail without a limit": (lambda b: b.policy(**rail(above=None)), ("guardrails[0]", "set one of them")),
    "guardrail that always acts": (
        lambda b: b.policy(**rail(above=1.0, below=2.0)),
        ("guardrails[0]", "every value", "exchange"),
    ),
    "no training": (
        lambda b: b.reward().model_copy(update={"reward_model_training": None}),
        ("rewardModelTraining", "recreate"),
    ),
    "no preferences": (lambda b: b.reward(preferences=None), ("preferences", "recreate")),
}

TABLE = PREFERENCES | POLICY_DATA | MODELS | CONFIGURATION


def _pad_is_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "pad_token": document["eos_token"]}))


@pytest.fixture(scope="module")
def world() -> World:
    return join(timedelta(seconds=60))


@pytest.fixture(scope="module")
def policies(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_policy_world(tmp_path_factory.mktemp("bad-input"), tiny_world)


@pytest.fixture
def bench(tiny_world: TinyWorld, policies: PolicyWorld, tmp_path: Path) -> Bench:
    return Bench(tiny_world, policies, tmp_path)


@pytest.fixture(autouse=True)
def _no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STATUS_PORT", "0")


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) + len(FILES) + len(CHECKPOINTS) >= 60


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_ends_with_exit_11_and_one_line(bench: Bench, world: World, name: str) -> None:
    spoil, words = TABLE[name]
    config = spoil(bench)
    kept = bench.folder / "out" / "a1" / "earlier.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("written before")
    config = AttemptConfig.model_validate_json(config.to_json())
    result = run_attempt(config, load_loop(config.kind), world, RankFiles(bench.folder, 0), StopSignal())
    assert (result.failure_class, result.exit_code) == (FailureClass.INVALID, ExitCode.INVALID), result.message
    assert "\n" not in result.message
    assert len(result.message) < 1500
    missing = [word for word in words if word not in result.message]
    assert not missing, result.message
    assert kept.read_text() == "written before"
    assert result.artifact is None


def test_the_benches_are_sound(bench: Bench) -> None:
    """Negative control: unspoilt, both attempts pass everything the table trips over."""
    for config in (bench.reward(), bench.policy()):
        check_attempt(config)


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
def test_a_bad_configuration_file_is_invalid(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write, words = FILES[name]
    path = bench.folder / "attempt.json"
    path.write_text(write(json.loads(bench.reward().to_json())))
    monkeypatch.setenv("RLHF_ATTEMPT_CONFIG", str(path))
    with pytest.raises(Invalid) as caught:
        read_config()
    assert "\n" not in caught.value.message
    missing = [word for word in (*words, str(path)) if word not in caught.value.message]
    assert not missing, caught.value.message


def test_a_sound_file_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.folder / "attempt.json"
    path.write_text(bench.reward().to_json())
    monkeypatch.setenv("RLHF_ATTEMPT_CONFIG", str(path))
    assert read_config() == bench.reward()


def test_kl_with_a_wrong_gradient_is_no_configuration() -> None:
    with pytest.raises(ValidationError, match="wrong gradient"):
        policy_training(kl={"placement": "loss", "estimator": "k1"})


class Box:
    """A component that remembers whether it was filled."""

    def __init__(self) -> None:
        self.loaded = False

    def save(self, folder: Path) -> None:
        (folder / "state.json").write_text('{"value": 1}')

    def load(self, folder: Path) -> None:
        self.loaded = bool(json.loads((folder / "state.json").read_text()))


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest"),
    "manifest not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest"),
    "manifest edited": (lambda f: edit_json("manifest.json", step=99)(f), "manifest"),
    "entry taken out": (lambda f: edit_json("manifest.json", files={})(f), "manifest"),
    "file deleted": (lambda f: (f / "box" / "state.json").unlink(), "component 'box'"),
    "file emptied": (lambda f: (f / "box" / "state.json").write_text(""), "component 'box'"),
    "file altered": (lambda f: (f / "box" / "state.json").write_text('{"value": 2}'), "component 'box'"),
    "folder deleted": (lambda f: shutil.rmtree(f / "box"), "component 'box'"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_passed_over_by_name_for_the_one_before(tmp_path: Path, world: World, name: str) -> None:
    """Not exit 11: a run that has an older good checkpoint goes on from it, and says what was wrong."""
    spoil, reason = CHECKPOINTS[name]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    store = CheckpointStore(tmp_path, 1, "sha256:d", Checkpoints().keep_last, world, lambda: now)
    for step in (1, 2):
        store.save(step, {"box": Box()})
    spoil(tmp_path / "a1" / "checkpoints" / "step-00000002")
    found, skipped = store.find(["box"], lambda: None)
    assert found is not None
    assert found.manifest.step == 1
    assert [each.step for each in skipped] == [2]
    assert reason in skipped[0].reason
    assert "\n" not in skipped[0].reason
