"""The oracle counts what users saw, by arm and revision."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlhf_trainer.desk import datasets
from rlhf_trainer.desk.__main__ import main
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


def test_nobody_is_asked_to_score_an_answer_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent_at_times(*_policy: object, seed: int, step: int = 0) -> list[str]:
        prompts = _policy[-1]
        assert isinstance(prompts, list)
        return ["" if (index + step + seed) % 3 == 0 else "please restart ." for index in range(len(prompts))]

    monkeypatch.setattr(datasets, "answer", silent_at_times)
    rows = datasets.score_rows(random.Random(0), (None, None), count=20, sample_seed=0)
    assert len(rows) == 20
    assert all(row["response"] for row in rows)


def test_the_command_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pod's log mixes both streams line by line: what is one line stays whole."""
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"arm": "stable", "revision": "r1", "status": 200, "text": "glad to help"}) + "\n")
    assert main(["judge-answers", "--answers", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed)["requests"] == 1
