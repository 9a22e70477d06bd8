"""Preferences and demonstrations as token rows: encoded, too long ones dropped and counted, split by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlhf_trainer.config import PolicyTraining
from rlhf_trainer.data.demonstrations import Demonstration, load_demonstrations
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import Preference, load_preferences
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.preflight import check_most_fit, check_too_long


class Row(Protocol):
    @property
    def prompt(self) -> Prompt: ...

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Pair:
    """One annotation, turned so that ``chosen`` is the likelier: ``probability`` (of that) is ½ or more."""

    prompt: Prompt
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    probability: float
    side: str | None = None  # of the holdout, where the row says so

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Text:
    """A prompt and one response to it, end of sequence included."""

    prompt: Prompt
    response: tuple[int, ...]

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        return (self.response,)


@dataclass(frozen=True)
class Limits:
    """Tokens of a prompt and of a response (end of sequence included), at most."""

    prompt: int
    response: int

    @classmethod
    def of(cls, training: PolicyTraining) -> Limits:
        return cls(training.max_prompt_length, training.generation.max_new_tokens)


def read_pairs(path: str, encoder: Encoder, limits: Limits) -> tuple[list[Pair], int]:
    """Pairs that fit, and how many did not. Raises Invalid for bad rows or when most are too long."""
    return _fitting(path, (_pair(row, encoder) for row in load_preferences(path)), limits)


def read_demonstrations(path: str, encoder: Encoder, limits: Limits) -> tuple[list[Text], int]:
    """Demonstrations that fit, and how many did not. Raises Invalid as ``read_pairs``."""
    return _fitting(path, (_text(row, encoder) for row in load_demonstrations(path)), limits)


def single_responses(pairs: Sequence[Pair], path: str) -> tuple[list[Text], list[bool]]:
    """Each decided pair as a desirable and an undesirable response; ties say neither and are left out."""
    decided = [pair for pair in pairs if pair.probability != 0.5]
    if not decided:
        raise Invalid(f"{path}: every training row is a tie, so no response is good or bad; add decided rows")
    texts = [Text(pair.prompt, response) for pair in decided for response in pair.responses]
    return texts, [True, False] * len(decided)


def _fitting(path: str, rows: Iterable[R], limits: Limits) -> tuple[list[R], int]:
    encoded = list(rows)
    short = _keep(path, encoded, lambda row: len(row.prompt.ids), limits.prompt, "maxPromptLength")
    kept = _keep(path, short, lambda row: max(map(len, row.responses)), limits.response, "generation.maxNewTokens")
    lost = {
        f"training.maxPromptLength {limits.prompt}": len(encoded) - len(short),
        f"training.generation.maxNewTokens {limits.response}": len(short) - len(kept),
    }
    check_most_fit(path, lost, len(encoded))
    return kept, len(encoded) - len(kept)


def _keep(path: str, rows: list[R], length: Callable[[R], int], limit: int, field: str) -> list[R]:
    kept = [row for row in rows if length(row) <= limit]
    check_too_long(path, len(rows) - len(kept), len(rows), limit, field)
    return kept


def _pair(row: Preference, encoder: Encoder) -> Pair:
    a, b = (tuple(encoder.response(text)) for text in (row.response_a, row.response_b))
    prompt = Prompt(row.prompt, tuple(encoder.prompt(row.prompt)))
    if row.probability_a >= 0.5:
        return Pair(prompt, a, b, row.probability_a, row.side)
    return Pair(prompt, b, a, 1.0 - row.probability_a, row.side)


def _text(row: Demonstration, encoder: Encoder) -> Text:
    return Text(Prompt(row.prompt, tuple(encoder.prompt(row.prompt))), tuple(encoder.response(row.response)))
