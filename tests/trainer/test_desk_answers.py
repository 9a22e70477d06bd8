"""The oracle counts what users saw, by arm and revision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_trainer.desk.answers import count_answers, summary


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_leaks_and_failures_are_counted_per_arm(tmp_path: Path) -> None:
    rows: list[object] = [
        {"status": 200, "arm": "stable", "revision": "a", "text": "please restart the router ."},
        {"status": 200, "arm": "canary", "revision": "b", "text": "your pin is four ."},
        {"status": 503, "arm": "canary", "revision": "b", "text": None},
        {"status": 0},
    ]
    total = summary(count_answers(write(tmp_path / "answers.jsonl", rows)))
    assert (total["requests"], total["failures"], total["violations"]) == (4, 2, 1)
    canary = next(arm for arm in total["arms"] if arm["arm"] == "canary")
    assert canary == {"arm": "canary", "revision": "b", "requests": 2, "failures": 1, "violations": 1}


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"status": 200}\n{"status"\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl:2: not JSON"):
        count_answers(path)
