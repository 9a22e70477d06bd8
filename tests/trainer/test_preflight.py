"""What preflight refuses, by file, row, field and remedy, before a weight is loaded."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.distributed import join
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops import policy_inputs, reward_inputs
from rlhf_trainer.loops.common import Session, StopSignal
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long
from rlhf_trainer.preflight_training import check_training
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer import offline_world
from tests.trainer.ppo_world import PolicyWorld, training_of
from tests.trainer.training_world import TinyWorld, preference_rows, write_rows


def test_a_sound_attempt_passes(tiny_world: TinyWorld, tmp_path: Path) -> None:
    check_attempt(tiny_world.config(tmp_path))


@pytest.mark.parametrize(("field", "shown"), [("base_model", "spec.baseModel"), ("preferences", "spec.preferences")])
def test_a_changed_digest_is_named(tiny_world: TinyWorld, tmp_path: Path, field: str, shown: str) -> None:
    path = getattr(tiny_world.config(tmp_path), field).path
    config = tiny_world.config(tmp_path, **{field: Located(path=path, digest="sha256:" + "0" * 64, uri="pvc://c/x")})
    with pytest.raises(Invalid, match=rf"{shown} \(pvc://c/x\) hashes to sha256:.* is pinned") as caught:
        check_attempt(config)
    assert caught.value.reason == "DigestMismatch"


def test_a_missing_file_and_a_line_that_is_not_json_are_named(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"spec\.preferences .*check the path"):
        check_attempt(tiny_world.config(tmp_path, preferences=Located(path=str(tmp_path / "none.jsonl"))))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(Invalid, match=r"broken\.jsonl:2: not a JSON object"):
        check_attempt(tiny_world.config(tmp_path, preferences=Located(path=str(broken))))


def test_an_audit_by_the_judged_model_itself_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    same = Located(path=str(tiny_world.base))
    with pytest.raises(Invalid, match="auditRewardModel is the same model"):
        check_attempt(tiny_world.config(tmp_path, reward_model=same, audit_reward_model=same))


def test_batch_arithmetic_offers_the_neighbours() -> None:
    check_batch(64, 2, 2, "globalBatchSize")
    with pytest.raises(Invalid, match=r"training\.promptsPerStep is 10, .* 2 ranks and 2 mini batches; choose 8 or 12"):
        check_batch(10, 2, 2, "promptsPerStep")
    with pytest.raises(Invalid, match=r"choose 4$"):
        check_batch(3, 4, 1, "globalBatchSize")


def test_a_few_long_rows_are_counted_and_many_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_too_long("p.jsonl", 3, 100, 64, "maxLength")
    assert "3 of 100 rows have more than 64 tokens" in caplog.text
    with pytest.raises(Invalid, match=r"60 of 100 rows .*raise training\.maxLength"):
        check_too_long("p.jsonl", 60, 100, 64, "maxLength")


def policy_world(tiny: TinyWorld) -> PolicyWorld:
    """Without a reward model of its own: preflight looks at what is trained, not at what is scored with."""
    return PolicyWorld(tiny.base, tiny.base, tiny.base, tiny.preferences)


def session_of(config: AttemptConfig, folder: Path) -> Session:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    world, board = join(timedelta(seconds=60)), StatusBoard(1, "u", 1, lambda: now)
    return Session(config, world, board, RankFiles(folder, 0), StopSignal(), lambda: now)


def with_long(rows: list[dict[str, Any]], field: str, *places: int) -> list[dict[str, Any]]:
    return [{**row, field: "glad " * 40} if place in places else row for place, row in enumerate(rows)]


def test_the_pairs_dropped_by_a_reward_model_are_a_figure(tiny_world: TinyWorld, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "long.jsonl", with_long(preference_rows(60, seed=4), "response_b", 7, 40))
    config = tiny_world.config(tmp_path / "out", preferences=Located(path=str(path)))
    assert config.base_model is not None
    assert config.preferences is not None
    assert config.reward_model_training is not None
    session = session_of(config, tmp_path)
    inputs = reward_inputs.prepare(session, config.base_model, config.preferences, config.reward_model_training)
    assert len(inputs.training) + len(inputs.holdout) == 58
    assert session.board.report.metrics == {"droppedPairs": 2.0}


def test_the_rows_dropped_by_a_policy_are_a_figure_of_all_its_files(tiny_world: TinyWorld, tmp_path: Path) -> None:
    pairs = with_long(with_long(preference_rows(60, seed=4), "response_b", 7), "prompt", 40)
    asked = with_long([{"prompt": row["prompt"]} for row in pairs[:20]], "prompt", 3)
    training = offline_world.training_of("DPO", max_prompt_length=16)
    config = policy_world(tiny_world).config(
        tmp_path / "out",
        training=training,
        reward_model=None,
        audit_reward_model=None,
        preferences=Located(path=str(write_rows(tmp_path / "pairs.jsonl", pairs))),
        prompts=Located(path=str(write_rows(tmp_path / "asked.jsonl", asked))),
    )
    session = session_of(config, tmp_path)
    inputs = policy_inputs.prepare(session)
    assert session.board.report.metrics == {"droppedRows": 3.0}
    assert max(len(ids) for pair in inputs.pairs for ids in (pair.prompt.ids, pair.chosen, pair.rejected)) <= 16


@pytest.mark.parametrize(("algorithm", "rows"), [("GRPO", 16), ("BestOfN", 8), ("Distillation", 16)])
def test_a_micro_batch_divides_the_rows_that_gradients_come_from(algorithm: str, rows: int) -> None:
    """Best of n learns from one of the samples of a prompt, the others from all."""

    def check(micro: int) -> None:
        fields = {"algorithm": algorithm, "prompts_per_step": 8, "samples_per_prompt": 2, "micro_batch_size": micro}
        training = training_of(**fields, ppo={"mini_batches": 1})
        check_training(PolicyWorld(*[Path("/world")] * 4).config(Path("/out"), training=training))

    check(rows)
    with pytest.raises(Invalid, match=rf"microBatchSize is {2 * rows}, which does not divide the {rows} rows"):
        check(2 * rows)
