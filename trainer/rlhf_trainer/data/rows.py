"""Reading JSONL feedback: every bad row is named with file, line, field and remedy; unknown columns are ignored."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf_trainer.exits import Invalid

Row = dict[str, Any]
R = TypeVar("R")

_SHOWN = 5  # bad rows quoted in one message
_PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_BOTH_BAD = "both_bad"  # feeds safety only: it orders nothing
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
    side: str | None = None  # of the holdout, where the row says so (its ``split`` column)


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a safety suite."""

    prompt: str
    category: str = UNKNOWN


@dataclass(frozen=True)
class ScoredResponse:
    prompt: str
    response: str
    score: float


class RowProblem(ValueError):
    """What is wrong with one row, without where it lies."""


def load_preferences(path: Path | str) -> list[Preference]:
    """Rows ``{prompt, response_a, response_b, preference: a|b|tie|both_bad}`` or ``{prompt, chosen, rejected}``.

    An optional ``probability_a`` (of aggregated labels) replaces what ``preference`` says; ``both_bad`` rows order
    nothing and are left out. A prompt or response may be a list of messages, which is flattened by `plain_text`.
    """
    rows = [row for row in load_rows(Path(path), _preference) if row is not None]
    if not rows:
        raise Invalid(f"{path}: every row is {_BOTH_BAD!r}, so nothing is compared; add rows that prefer one response")
    return rows


def load_prompts(path: Path | str) -> list[str]:
    """Rows ``{prompt}``; a prompt given twice counts once, in the place it was first seen."""
    return list(dict.fromkeys(load_rows(Path(path), lambda row: text_of(row, "prompt"))))


def load_suite(path: Path | str) -> list[SuitePrompt]:
    """Rows ``{prompt, category}``, the category optional; a prompt given twice counts once, where it was first seen."""
    found: dict[str, SuitePrompt] = {}
    for row in load_rows(Path(path), lambda row: SuitePrompt(text_of(row, "prompt"), _name(row, "category"))):
        found.setdefault(row.prompt, row)
    return list(found.values())


def load_scores(path: Path | str) -> list[ScoredResponse]:
    """Rows ``{prompt, response, score}`` of trusted scalar scores."""
    return load_rows(
        Path(path), lambda row: ScoredResponse(text_of(row, "prompt"), response_of(row, "response"), _score(row))
    )


def _preference(row: Row) -> Preference | None:
    explicit = "chosen" in row or "rejected" in row
    names = ("chosen", "rejected") if explicit else ("response_a", "response_b")
    choice = "a" if explicit else row.get("preference")
    if not isinstance(choice, str) or choice not in (*_PREFERENCES, _BOTH_BAD):
        raise RowProblem(
            f"field 'preference' is {choice!r}, not one of a, b, tie, both_bad; correct it or drop the row"
        )
    prompt, a, b = text_of(row, "prompt"), response_of(row, names[0]), response_of(row, names[1])
    if a.split() == b.split():
        raise RowProblem(
            f"fields '{names[0]}' and '{names[1]}' are the same text, so nothing was compared; drop the row"
        )
    if choice == _BOTH_BAD:
        return None
    soft = row.get("probability_a")
    probability = _PREFERENCES[choice] if soft is None else number_within(soft, "probability_a", 0.0, 1.0)
    return Preference(
        prompt, a, b, probability,
        strength=None if row.get("strength") is None else number_within(row["strength"], "strength", 0.0, 3.0),
        cohort=_name(row, "cohort"),
        aspects=aspect_probabilities(row.get("aspects")),
        rater=_name(row, "rater_id"),
        side=None if row.get("split") in (None, "") else _name(row, "split"),
    )  # fmt: skip


def aspect_probabilities(value: Any) -> dict[str, float]:
    """Aspect → probability that a is the better: from ``a``, ``b``, ``tie``, or both scores ``{"a": 4, "b": 2}``.

    Raises RowProblem for anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowProblem(f"field 'aspects' is {type(value).__name__}; give a map of aspect to a, b, tie or scores")
    return {str(name): _aspect(f"aspects.{name}", given) for name, given in value.items()}


def _aspect(name: str, given: Any) -> float:
    if isinstance(given, str) and given in _PREFERENCES:
        return _PREFERENCES[given]
    if isinstance(given, dict) and set(given) == {"a", "b"}:
        a, b = (number_within(given[side], f"{name}.{side}", -math.inf, math.inf) for side in ("a", "b"))
        return 0.5 if a == b else float(a > b)
    raise RowProblem(f'field \'{name}\' is {given!r}; give a, b, tie or both scores as {{"a": 4, "b": 2}}')


def plain_text(value: Any, field: str) -> str:
    """Text of a prompt or response: a string as it is; one message is its content; several are ``role: content``
    lines in order. Raises RowProblem for anything else."""
    if not isinstance(value, list):
        return _string(value, field)
    if not value or not all(isinstance(message, dict) for message in value):
        raise RowProblem(f"field '{field}' is a list that holds no messages; give [{{role, content}}, ...] or a string")
    lines = [(message.get("role"), _string(message.get("content"), f"{field}.content")) for message in value]
    if any(not isinstance(role, str) or not role for role, _ in lines):
        raise RowProblem(f"field '{field}' has a message without a role; give each one user, assistant or system")
    return lines[0][1] if len(lines) == 1 else "\n".join(f"{role}: {content}" for role, content in lines)


def number_within(value: Any, field: str, low: float, high: float) -> float:
    """A finite number in [low, high]; raises RowProblem otherwise."""
    number = float(value) if is_number(value) else math.nan
    if not math.isfinite(number):
        raise RowProblem(f"field '{field}' is {value!r}; give a finite number")
    if not low <= number <= high:
        raise RowProblem(f"field '{field}' is {value!r}; give a number from {low:g} to {high:g}")
    return number


def is_number(value: Any) -> bool:
    """True for a JSON number that a float can hold; a bool is none, and neither is an integer of 400 digits."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023)


def _name(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None or value == "":
        return UNKNOWN
    if not isinstance(value, str):
        raise RowProblem(f"field '{field}' is {type(value).__name__}, not a text; give a string or leave it out")
    return characters(value, field)


def text_of(row: Row, field: str) -> str:
    if field not in row:
        raise RowProblem(f"field '{field}' is missing; give a non-empty string")
    return plain_text(row[field], field)


def response_of(row: Row, field: str) -> str:
    """Text of a response: the assistant's turns alone. Published data sets often repeat the dialogue there."""
    said = text_of(row, field)
    if other := foreign_roles(row[field]):
        raise RowProblem(
            f"field '{field}' has turns of {', '.join(other)}; a response holds the assistant's turns alone, what "
            "stands before them belongs in 'prompt' (`data import` moves it)"
        )
    return said


def foreign_roles(response: Any) -> list[str]:
    """Roles of a response's messages other than the assistant's."""
    roles = (
        [message.get("role") for message in response if isinstance(message, dict)] if isinstance(response, list) else []
    )
    return sorted({str(role) for role in roles} - {"assistant"})


def _string(value: Any, field: str) -> str:
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise RowProblem(f"field '{field}' is empty; give a non-empty string")
    if not isinstance(value, str):
        raise RowProblem(f"field '{field}' is {type(value).__name__}, not a text; give a non-empty string")
    return characters(value, field)


def characters(text: str, field: str) -> str:
    """JSON can escape half of a surrogate pair, as exports do that cut an emoji in two; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            f"field '{field}' holds half of a surrogate pair, which is no character; repair the text"
        ) from error
    return text


def _score(row: Row) -> float:
    return number_within(row.get("score"), "score", -math.inf, math.inf)


def load_rows(path: Path, parse: Callable[[Row], R]) -> list[R]:
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
                if number == 1:
                    raw = raw.removeprefix(BOM_UTF8)
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
