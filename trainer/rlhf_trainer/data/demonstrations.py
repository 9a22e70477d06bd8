"""Demonstrations: prompts with the response to learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_trainer.data.rows import load_rows, response_of, text_of


@dataclass(frozen=True)
class Demonstration:
    prompt: str
    response: str


def load_demonstrations(path: Path | str) -> list[Demonstration]:
    """Rows ``{prompt, response}``. Raises Invalid naming file, line, field and remedy."""
    return load_rows(Path(path), lambda row: Demonstration(text_of(row, "prompt"), response_of(row, "response")))
