"""Argilla v2's flat export: one record, parallel lists of responses, users and statuses per question.

Only submitted responses count. The flat export carries no time.
"""

from __future__ import annotations

from typing import Any

from rlhf_trainer.data.importers.base import Converted, Format, compact, identity, messages, text
from rlhf_trainer.data.rows import Row, RowProblem

_SUFFIX = ".responses"
_PROMPTS = ("prompt", "instruction", "question")
_PAIRS = (
    ("response_a", "response_b"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("answer1", "answer2"),
    ("generation_a", "generation_b"),
    ("chosen", "rejected"),
)
_SIDES = {"a": 0, "1": 0, "first": 0, "left": 0, "b": 1, "2": 1, "second": 1, "right": 1}
_NEITHER = {"tie": "tie", "equal": "tie", "both": "tie", "both_bad": "both_bad", "neither": "both_bad"}


def convert(row: Row) -> Converted:
    question = _question(row)
    prompt_field = next((name for name in _PROMPTS if name in row), None)
    sides = next((pair for pair in _PAIRS if all(name in row for name in pair)), None)
    if prompt_field is None or sides is None:
        raise RowProblem(
            f"no prompt field ({', '.join(_PROMPTS)}) with two response fields ({' / '.join(map('+'.join, _PAIRS))}); "
            "rename the data set's fields"
        )
    prompt = row[prompt_field]
    pair = {
        "prompt": messages(prompt, prompt_field) if isinstance(prompt, list) else text(row, prompt_field),
        "response_a": text(row, sides[0]),
        "response_b": text(row, sides[1]),
    }
    answers, users, statuses = (
        _list(row, f"{question}{suffix}") for suffix in (_SUFFIX, f"{_SUFFIX}.users", f"{_SUFFIX}.status")
    )
    if not len(answers) == len(users) == len(statuses):
        raise RowProblem(f"the lists of question '{question}' have different lengths; export the data set again")
    rows, skipped = [], []
    for part, (answer, user, status) in enumerate(zip(answers, users, statuses, strict=True)):
        if status != "submitted":
            skipped.append(f"status {status}")
            continue
        about = {"preference": _preference(answer, sides), "rater_id": str(user), "rater_type": "human"}
        rows.append(compact({"annotation_id": identity("argilla", row, f"{part}/{user}"), **pair, **about}))
    return Converted(rows, skipped if answers else ["not annotated"])


def _question(row: Row) -> str:
    """The one question with responses whose answers name a side."""
    questions = [name.removesuffix(_SUFFIX) for name in row if name.endswith(_SUFFIX)]
    if len(questions) == 1:
        return questions[0]
    named = [name for name in questions if name in ("preference", "choice", "better")]
    if len(named) != 1:
        raise RowProblem(f"questions {', '.join(questions)}: name the one that compares 'preference'")
    return named[0]


def _preference(answer: Any, sides: tuple[str, str]) -> str:
    """a, b, tie or both_bad of a label, or of a ranking: [{value, rank}, ...] of the server, [value, ...] with the best
    first of the flat export, which has lost who were level."""
    if isinstance(answer, list) and len(answer) == 2:
        ranked: list[tuple[Any, Any]] = [
            (each.get("value"), each.get("rank")) if isinstance(each, dict) else (each, place)
            for place, each in enumerate(answer)
        ]
        ranks = {_side(value, sides): rank for value, rank in ranked}
        if set(ranks) == {0, 1} and all(isinstance(rank, int) for rank in ranks.values()):
            return "tie" if ranks[0] == ranks[1] else "a" if ranks[0] < ranks[1] else "b"
    elif isinstance(answer, str):
        if answer.casefold() in _NEITHER:
            return _NEITHER[answer.casefold()]
        side = _side(answer, sides)
        if side is not None:
            return "ab"[side]
    raise RowProblem(f"answer {answer!r} names neither {sides[0]} nor {sides[1]}, tie or both_bad; rename the labels")


def _side(value: Any, sides: tuple[str, str]) -> int | None:
    name = str(value).casefold()
    return sides.index(name) if name in sides else _SIDES.get(name)


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowProblem(f"field '{name}' is {type(value).__name__}, not a list; use the flat export of Argilla 2")
    return value


FORMATS = (
    Format(
        "argilla",
        "<question>.responses, .responses.users, .responses.status (the flat export)",
        lambda row: any(name.endswith(_SUFFIX) for name in row),
        convert,
        "order and time",
    ),
)
