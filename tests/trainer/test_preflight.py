"""What preflight refuses, by file, row, field and remedy, before a weight is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from rlhf_trainer import preflight
from rlhf_trainer.exits import Invalid
from rlhf_trainer.preflight import check_attempt, check_batch, check_too_long, count_parameters, training_bytes
from rlhf_trainer.wire import Located
from tests.trainer.training_world import TinyWorld


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


def test_memory_by_zero_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert [training_bytes(1000, stage, 4) for stage in range(4)] == [16_000, 10_000, 7_000, 4_000]
    assert count_parameters(tmp_path) is None
    save_file({"a": zeros(3, 5), "b": zeros(7)}, tmp_path / "model.safetensors")
    assert count_parameters(tmp_path) == 22
    monkeypatch.setattr(preflight, "memory_limit", lambda: 300)
    with caplog.at_level(logging.WARNING):
        preflight.warn_of_memory(tmp_path, 1, 0, 2)
    assert "raise deepspeed.zeroStage" in caplog.text
    caplog.clear()
    preflight.warn_of_memory(tmp_path, 1, 3, 2)
    assert not caplog.text
