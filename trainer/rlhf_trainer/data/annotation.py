"""The annotation record: one rater's view of one pair, and nothing aggregated.

Trainer formats drop rater, time and order, and with them every chance to say whether labels can be trusted, so the unit
kept here is the annotation. `parse` never raises: what is wrong with a row comes back as findings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from rlhf_trainer.data.findings import Finding, finding
from rlhf_trainer.data.rows import (
    UNKNOWN,
    Row,
    RowProblem,
    aspect_probabilities,
    characters,
    foreign_roles,
    number_within,
    plain_text,
)
from rlhf_trainer.data.text import encoded, normal
from rlhf_trainer.digests import row_digest

SCHEMA_VERSION = 1
PREFERENCES = ("a", "b", "tie", "both_bad")
RATER_TYPES = ("human", "model", "rule", "synthetic")
SPLITS = ("train", "val", "holdout", "audit", "quarantine")
DERIVED = frozenset({"pair_id", "split"})  # what follows from the other columns and earlier versions

_SCORE_LIMIT = 1e9
_FLIPPED = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Annotation:
    """A valid row. ``aspects`` maps a name to P(a is better), ``aspect_scores`` to both scores where they are given."""

    row: int
    annotation_id: str
    prompt: str
    response_a: str
    response_b: str
    preference: str
    strength: float | None = None
    score_a: float | None = None
    score_b: float | None = None
    aspects: Mapping[str, float] = field(default_factory=dict)
    aspect_scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rater_id: str = UNKNOWN
    rater_type: str = "human"
    cohort: str = UNKNOWN
    language: str = UNKNOWN
    task: str = UNKNOWN
    model_a: str = UNKNOWN
    model_b: str = UNKNOWN
    created_at: datetime | None = None
    duration_s: float | None = None
    confidence: float | None = None
    shown_first: str | None = None
    gold_preference: str | None = None
    safety_a: bool | None = None
    safety_b: bool | None = None
    split: str | None = None

    @cached_property
    def flipped(self) -> bool:
        """True when the pair's canonical order (by text) is b, a."""
        return normal(self.response_a) > normal(self.response_b)

    @cached_property
    def pair_id(self) -> str:
        """Identity of prompt and the unordered pair of responses."""
        return pair_id(self.prompt, self.response_a, self.response_b)

    @property
    def choice(self) -> str:
        """The preference in canonical order, so that raters who saw the pair either way round compare."""
        return oriented(self.preference, self.flipped)

    @property
    def gold_choice(self) -> str | None:
        return None if self.gold_preference is None else oriented(self.gold_preference, self.flipped)

    @property
    def has_rater(self) -> bool:
        return self.rater_id != UNKNOWN


def oriented(preference: str, flipped: bool) -> str:
    return _FLIPPED.get(preference, preference) if flipped else preference


def pair_id(prompt: str, first: str, second: str) -> str:
    """32 hex digits over prompt and the unordered pair; layout does not matter."""
    parts = [normal(prompt), *sorted((normal(first), normal(second)))]
    return hashlib.sha256(b"\0".join(encoded(part) for part in parts)).hexdigest()[:32]


def annotation_id(row: Row) -> str:
    """The row's own id, else one from its content (derived columns left out)."""
    given = row.get("annotation_id")
    if isinstance(given, str) and given:
        return given
    kept = {key: value for key, value in row.items() if key not in DERIVED}
    return f"row-{row_digest(kept).hex()[:32]}"


def parse(row: Row, number: int) -> tuple[Annotation | None, list[Finding]]:
    """The annotation of a row, or None with the errors; ``number`` is the 1-based row of the file."""
    found: list[Finding] = []
    fields: dict[str, Any] = {}
    for name, (code, read) in _REQUIRED.items():
        _read(fields, found, number, name, code, lambda name=name, read=read: read(row, name))  # type: ignore[misc]
    for name, check in _OPTIONAL.items():
        if row.get(name) is not None and row.get(name) != "":
            _read(fields, found, number, name, "PREF004", lambda name=name, check=check: check(row[name], name))  # type: ignore[misc]
    found += _roles(row.get("prompt"), number)
    found += [each for name in ("response_a", "response_b") for each in _answers(row.get(name), name, number)]
    if "response_a" in fields and "response_b" in fields and _same(fields["response_a"], fields["response_b"]):
        found.append(finding("PREF010", "fields 'response_a' and 'response_b' are the same text", number, "response_b"))
    if fields.pop("is_gold", False) and "gold_preference" not in fields:
        found.append(finding("PREF004", "is_gold is true but gold_preference is missing", number, "gold_preference"))
    if found:
        return None, found
    scores = fields.get("aspects", {})
    fields["aspects"] = aspect_probabilities(scores)
    fields["aspect_scores"] = {
        name: (float(given["a"]), float(given["b"])) for name, given in scores.items() if isinstance(given, dict)
    }
    return Annotation(row=number, annotation_id=annotation_id(row), **fields), []


def _same(a: str, b: str) -> bool:
    return normal(a) == normal(b)


def _read(
    fields: dict[str, Any], found: list[Finding], number: int, name: str, code: str, read: Callable[[], Any]
) -> None:
    try:
        fields[name] = read()
    except RowProblem as problem:
        # A row problem ends with its own remedy; the rule has one already.
        found.append(finding(code, str(problem).split(";")[0], number, name))


def _text(row: Row, name: str) -> str:
    if name not in row:
        raise RowProblem(f"field '{name}' is missing")
    return plain_text(row[name], name)


def _choice(row: Row, name: str) -> str:
    return _one_of(PREFERENCES)(row.get(name), name)


def _one_of(allowed: tuple[str, ...]) -> Callable[[Any, str], str]:
    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise RowProblem(f"field '{name}' is {_short(value)}, not one of {', '.join(allowed)}")
        return value

    return check


def _within(low: float, high: float) -> Callable[[Any, str], float]:
    return lambda value, name: number_within(value, name, low, high)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"field '{name}' is {type(value).__name__}, not a text")
    return characters(value, name)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise RowProblem(f"field '{name}' is {_short(value)}, not true or false")
    return value


def _time(value: Any, name: str) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        time = None
    if time is None or time.tzinfo is None:
        raise RowProblem(f"field '{name}' is {_short(value)}, not an RFC 3339 time with its zone")
    return time


def _aspects(value: Any, _name: str) -> Mapping[str, Any]:
    aspect_probabilities(value)
    return dict(value)


def _safety(value: Any, name: str) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("violation"), bool):
        raise RowProblem(f"field '{name}' is {_short(value)}, not an object with violation: true or false")
    return bool(value["violation"])


def _roles(prompt: Any, number: int) -> list[Finding]:
    """Turns alternate and end with the user's; one system message may come first."""
    if not isinstance(prompt, list):
        return []
    roles = [message.get("role") if isinstance(message, dict) else None for message in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns and turns == [("user", "assistant")[(len(turns) - 1 - at) % 2] for at in range(len(turns))]:
        return []
    return [finding("PREF003", f"roles must alternate and end with user; got {_short(roles)}", number, "prompt")]


def _answers(response: Any, name: str, number: int) -> list[Finding]:
    """A response is what the assistant said; the dialogue before it belongs in the prompt."""
    other = foreign_roles(response)
    return [finding("PREF003", f"field '{name}' has turns of {', '.join(other)}", number, name)] if other else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_REQUIRED: dict[str, tuple[str, Callable[[Row, str], str]]] = {
    "prompt": ("PREF001", _text),
    "response_a": ("PREF001", _text),
    "response_b": ("PREF001", _text),
    "preference": ("PREF002", _choice),
}
_OPTIONAL: dict[str, Callable[[Any, str], Any]] = {
    "strength": _within(0.0, 3.0),
    "score_a": _within(-_SCORE_LIMIT, _SCORE_LIMIT),
    "score_b": _within(-_SCORE_LIMIT, _SCORE_LIMIT),
    "aspects": _aspects,
    "rater_id": _string,
    "rater_type": _one_of(RATER_TYPES),
    "cohort": _string,
    "language": _string,
    "task": _string,
    "model_a": _string,
    "model_b": _string,
    "created_at": _time,
    "duration_s": _within(0.0, 1e7),
    "confidence": _within(0.0, 1.0),
    "shown_first": _one_of(("a", "b")),
    "is_gold": _flag,
    "gold_preference": _one_of(("a", "b", "tie")),
    "safety_a": _safety,
    "safety_b": _safety,
    "split": _one_of(SPLITS),
}
COLUMNS = frozenset({"annotation_id", *_REQUIRED, *_OPTIONAL, *DERIVED})  # of the contract
