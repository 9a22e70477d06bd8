"""What every importer is: one source record in, annotation rows out, what was left out counted by reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.data.rows import Row, RowProblem, is_number
from rlhf_trainer.digests import row_digest

Message = dict[str, str]


@dataclass(frozen=True)
class Converted:
    """Annotation rows of one record; ``skipped`` holds a reason for each part that is no annotation."""

    rows: Sequence[Row] = ()
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class Format:
    """One accepted format. ``matches`` sees a sample record; ``convert`` raises RowProblem for a record it refuses."""

    name: str
    columns: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row], Converted]
    unknown: str = ""  # what the format cannot say, for the report


def compact(row: Row) -> Row:
    """Without the columns nobody filled in."""
    return {key: value for key, value in row.items() if value is not None and value != {}}


def identity(name: str, record: Row, part: object = "") -> str:
    """A stable annotation id for a record that has none."""
    return f"{name}-{row_digest({'record': record, 'part': str(part)}).hex()[:20]}"


def messages(value: Any, field: str) -> list[Message]:
    """Checked list of {role, content}; extra keys are dropped. Raises RowProblem."""
    if not isinstance(value, list) or not value:
        raise RowProblem(f"field '{field}' is not a list of messages; give [{{role, content}}, ...]")
    checked = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowProblem(f"field '{field}' has a message without text in role and content; correct it")
        checked.append({"role": role, "content": content})
    return checked


def text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RowProblem(f"field '{field}' is missing, empty or no text; give a non-empty string")
    return value


def number(value: Any, field: str) -> float:
    if not is_number(value):
        raise RowProblem(f"field '{field}' is {value!r}; give a number")
    return float(value)


def has_text(row: Row, *fields: str) -> bool:
    return all(isinstance(row.get(field), str) for field in fields)


def has_list(row: Row, *fields: str) -> bool:
    return all(isinstance(row.get(field), list) for field in fields)


def common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """(shared prompt, rest of chosen, rest of rejected); the prompt ends before the assistant's last turns.

    Raises RowProblem unless both rests are assistant turns alone: then something else than the answer differs.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    rests = chosen[shared:], rejected[shared:]
    if not shared or any(message["role"] != "assistant" for rest in rests for message in rest):
        raise RowProblem(
            "fields 'chosen' and 'rejected' differ before the assistant's last turn; both must answer the same dialogue"
        )
    return chosen[:shared], *rests


def joined(turns: list[Message]) -> str:
    """The text of one answer: its assistant turns, one per paragraph."""
    return "\n\n".join(turn["content"] for turn in turns)
