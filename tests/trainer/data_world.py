"""Invented raters over pairs whose truth is known: what every estimate of the data tests is held against."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_trainer.data.annotation import Annotation, parse

ROW: dict[str, Any] = {"prompt": "name a river", "response_a": "the elbe", "response_b": "a lake", "preference": "a"}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def annotations_of(rows: Sequence[Mapping[str, Any]]) -> list[Annotation]:
    parsed = [parse(dict(row), number) for number, row in enumerate(rows, start=1)]
    assert [found for _, findings in parsed for found in findings] == []
    return [annotation for annotation, _ in parsed if annotation is not None]


def rows_by(
    skills: Mapping[str, float], *, pairs: int, labels: int, gold: float = 0.0, seed: int = 0, ties: float = 0.0
) -> list[dict[str, Any]]:
    """``labels`` rows per pair by different raters who are right with their skill; a is always the truth's text."""
    rng = random.Random(seed)
    rows = []
    for pair in range(pairs):
        truth, is_gold = rng.choice("ab"), rng.random() < gold
        for rater in rng.sample(sorted(skills), labels):
            right = rng.random() < skills[rater]
            choice = truth if right else {"a": "b", "b": "a"}[truth]
            row = {
                "annotation_id": f"{pair}-{rater}",
                "prompt": f"question {pair}",
                "response_a": f"answer {pair} one",
                "response_b": f"answer {pair} two",
                "preference": "tie" if rng.random() < ties else choice,
                "rater_id": rater,
                "shown_first": rng.choice("ab"),
                "duration_s": 10.0,
                "truth": truth,
            }
            rows.append(row | ({"is_gold": True, "gold_preference": truth} if is_gold else {}))
    return rows
