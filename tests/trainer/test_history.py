"""The curve of an attempt is kept line by line, and never at the price of the training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rlhf_trainer.history import HISTORY_FILE, History


def test_a_line_per_step_and_a_later_attempt_has_its_own_file(tmp_path: Path) -> None:
    for attempt, steps in (("a1", (1, 2)), ("a2", (2,))):
        history = History(tmp_path / attempt)
        for step in steps:
            history.append(step, {"reward": step / 2})
    lines = (tmp_path / "a1" / HISTORY_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}]
    assert len((tmp_path / "a2" / HISTORY_FILE).read_text().splitlines()) == 1


def test_a_disk_that_takes_nothing_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "a1")
    with caplog.at_level(logging.WARNING):
        history.append(1, {"reward": 0.0})
        history.append(2, {"reward": 0.0})
    assert [record.message for record in caplog.records if "no further metrics" in record.message]
    assert len(caplog.records) == 1
