"""Anthropic's helpful and harmless dialogues: two transcripts that differ in the last assistant turn."""

from __future__ import annotations

import re

from rlhf_trainer.data.importers.base import Converted, Format, Message, has_text, identity, text
from rlhf_trainer.data.importers.trl import cut_at_marker
from rlhf_trainer.data.rows import Row, RowProblem

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"  # an answer may hold the marks of other formats
_ROLES = {"Human": "user", "Assistant": "assistant"}


def convert(row: Row) -> Converted:
    _, prompt, a, b = cut_at_marker(text(row, "chosen"), text(row, "rejected"), markers=(_ANSWER,))
    return Converted(
        [
            {
                "annotation_id": identity("hh", row),
                "prompt": dialogue(prompt),
                "response_a": a,
                "response_b": b,
                "preference": "a",
                "rater_type": "human",
            }
        ]
    )


def dialogue(transcript: str) -> list[Message]:
    """Turns of a transcript; neighbouring turns of one speaker, which the data has, are one turn."""
    _, *parts = _TURN.split(transcript)
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    if not turns or turns[-1]["role"] != "user":
        raise RowProblem("the dialogue does not end with a 'Human:' turn before the last 'Assistant:'; drop the row")
    return turns


FORMATS = (
    Format(
        "hh",
        "chosen, rejected (transcripts of '\\n\\nHuman:' and '\\n\\nAssistant:' turns)",
        lambda row: (
            has_text(row, "chosen", "rejected")
            and "prompt" not in row
            and all(row[side].startswith("\n\nHuman:") for side in ("chosen", "rejected"))
        ),
        convert,
        "rater, time and order: agreement and position bias cannot be judged",
    ),
)
