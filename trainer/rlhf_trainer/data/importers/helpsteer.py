"""HelpSteer2 and HelpSteer3 preferences: a scale from -3 (the first is much better) to 3 (the second is)."""

from __future__ import annotations

import re
from typing import Any

from rlhf_trainer.data.importers.base import (
    Converted,
    Format,
    Message,
    compact,
    has_list,
    has_text,
    identity,
    messages,
    text,
)
from rlhf_trainer.data.rows import Row, RowProblem, is_number

_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")
_NEITHER = -100  # of an annotator who found both unfit for comparison
_UNKNOWN = "order; raters are known by position only, so nothing is said about one rater"


def convert_3(row: Row) -> Converted:
    """One annotation per ``individual_preference``; one of ``overall_preference`` where there are none."""
    base = {
        "prompt": messages(row.get("context"), "context"),
        "response_a": text(row, "response1"),
        "response_b": text(row, "response2"),
        "task": _optional_text(row, "domain"),
        "language": _optional_text(row, "language"),
    }
    scores = _individual(row, "individual_preference", "score")
    return _annotations("helpsteer3", row, base, scores or [row.get("overall_preference")])


def convert_2(row: Row) -> Converted:
    """One annotation per entry of ``all_preferences_unprocessed``; else one of ``preference_strength``."""
    base = {
        "prompt": dialogue(text(row, "prompt")),
        "response_a": text(row, "response_1"),
        "response_b": text(row, "response_2"),
    }
    scores = _individual(row, "all_preferences_unprocessed", "strength")
    return _annotations("helpsteer2", row, base, scores or [row.get("preference_strength")])


def dialogue(prompt: str) -> str | list[Message]:
    """A prompt of one turn as it is, several turns as messages; the published text marks where each of them starts."""
    first, *rest = _TURN.split(prompt)
    if not rest:
        return prompt
    spoken = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": speaker.lower(), "content": said.strip()} for speaker, said in spoken]


def _annotations(name: str, row: Row, base: Row, scores: list[Any]) -> Converted:
    rows, skipped = [], []
    for part, score in enumerate(scores):
        if is_number(score) and score == _NEITHER:
            skipped.append("neither response was valid")
            continue
        if not is_number(score) or not -3 <= score <= 3:
            raise RowProblem(f"preference {part} is {score!r}; give a number from -3 to 3")
        preference = "tie" if score == 0 else "a" if score < 0 else "b"
        about = {"preference": preference, "strength": abs(float(score)), "rater_type": "human"}
        rows.append(compact({"annotation_id": identity(name, row, part), **base, **about}))
    return Converted(rows, skipped)


def _individual(row: Row, field: str, score: str) -> list[Any]:
    """The scores of the list ``field``, of which there may be none."""
    given = row.get(field)
    if given is not None and not isinstance(given, list):
        raise RowProblem(f"field '{field}' is {type(given).__name__}, not a list; export the data set as published")
    return [each.get(score) if isinstance(each, dict) else None for each in given or []]


def _optional_text(row: Row, field: str) -> str | None:
    value = row.get(field)
    return value if isinstance(value, str) and value else None


FORMATS = (
    Format(
        "helpsteer3",
        "context, response1, response2, overall_preference, individual_preference",
        lambda row: has_list(row, "context") and has_text(row, "response1", "response2"),
        convert_3,
        _UNKNOWN,
    ),
    Format(
        "helpsteer2",
        "prompt, response_1, response_2, preference_strength",
        lambda row: has_text(row, "prompt", "response_1", "response_2") and "preference_strength" in row,
        convert_2,
        _UNKNOWN,
    ),
)
