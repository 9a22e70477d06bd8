"""Reading JSONL feedback: every bad row is named with file, line, field and remedy; unknown columns are ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf_trainer.exits import Invalid

Row = dict[str, Any]
R = TypeVar("R")

_SHOWN = 5  # bad rows quoted in one message
_PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Preference:
    """One annotation: one rater's view of one pair. ``probability_a`` is 1, 0, or ½ for a tie, or soft between.

    ``strength`` (0 to 3, None where nobody said) is how clear the choice was, ``aspects`` maps an aspect's name to the
    probability that a is the better there.
    """

    prompt: str
    response_a: str
    response_b: str
    probability_a: float
    strength: float | None = None
    cohort: str = UNKNOWN
    aspects: Mapping[str, float] = field(default_factory=dict)
    rater: str = UNKNOWN


@dataclass(frozen=True)
class ScoredResponse:
    prompt: str
    response: str
    score: float


class RowProblem(ValueError):
    """What is wrong with one row, without where it lies."""


def load_preferences(path: Path | str) -> list[Preference]:
    """Rows ``{prompt, response_a, response_b, preference: a|b|tie}`` or ``{prompt, chosen, rejected}``."""
    return _load(Path(path), _preference)


def load_prompts(path: Path | str) -> list[str]:
    """Rows ``{prompt}``; a prompt given twice counts once, in the place it was first seen."""
    return list(dict.fromkeys(_load(Path(path), lambda row: _text(row, "prompt"))))


def load_scores(path: Path | str) -> list[ScoredResponse]:
    """Rows ``{prompt, response, score}`` of trusted scalar scores."""
    return _load(Path(path), lambda row: ScoredResponse(_text(row, "prompt"), _text(row, "response"), _score(row)))


def _preference(row: Row) -> Preference:
    if "chosen" in row or "rejected" in row:
        pair = Preference(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"), 1.0)
        names = ("chosen", "rejected")
    else:
        choice = row.get("preference")
        if not isinstance(choice, str) or choice not in _PREFERENCES:
            raise RowProblem(f"field 'preference' is {choice!r}, not one of a, b, tie; correct it or drop the row")
        pair = Preference(
            _text(row, "prompt"),
            _text(row, "response_a"),
            _text(row, "response_b"),
            _PREFERENCES[choice],
            row.get("strength"),
            row.get("cohort") or UNKNOWN,
            {name: _PREFERENCES[order] for name, order in (row.get("aspects") or {}).items()},
            row.get("rater_id") or UNKNOWN,
        )
        names = ("response_a", "response_b")
    if pair.response_a.split() == pair.response_b.split():
        raise RowProblem(
            f"fields '{names[0]}' and '{names[1]}' are the same text, so nothing was compared; drop the row"
        )
    return pair


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if field not in row else f"{type(value).__name__}, not a text" if value else "empty"
        raise RowProblem(f"field '{field}' is {found}; give a non-empty string")
    return value


def _score(row: Row) -> float:
    value = row.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowProblem(f"field 'score' is {value!r}; give a finite number")
    return float(value)


def _load(path: Path, parse: Callable[[Row], R]) -> list[R]:
    records: list[R] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            records.append(parse(_object(line)))
        except RowProblem as problem:
            problems.append(f"{path}:{number}: {problem}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more rows" if len(problems) > _SHOWN else ""
        raise Invalid("; ".join(problems[:_SHOWN]) + more)
    if not records:
        raise Invalid(f"{path}: no rows; check that the right file was given")
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based line number, text) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    # Undecodable bytes become U+FFFD, which the row's JSON or fields then show.
                    yield number, raw.decode("utf-8", errors="replace")
    except OSError as error:
        raise Invalid(f"{path}: cannot be read ({error.strerror}); check the path and the mounted claim") from error


def _object(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise RowProblem(f"a JSON {type(row).__name__}; each line must be one JSON object")
    return row
