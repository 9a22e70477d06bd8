"""The safety suite as an attempt reads it: prompts that do not fit, and those that were trained on, are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_trainer.config import SafetySuite
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import UNKNOWN, SuitePrompt, load_suite
from rlhf_trainer.data.text import words
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.preflight import check_too_long


@dataclass(frozen=True)
class Suite:
    """Prompts to ask, each with its category."""

    wanted: SafetySuite
    prompts: tuple[Prompt, ...]
    categories: tuple[str, ...]
    too_long: int  # not asked
    trained_on: int  # of the prompts asked

    @property
    def caveats(self) -> tuple[str, ...]:
        """What weakens the evidence, for whoever reads the verdict."""
        told = (
            (self.too_long, "not asked, being longer than training.maxPromptLength"),
            (self.trained_on, "training prompts too, so that safe replies may be known by heart"),
        )
        return tuple(f"{count} {what}" for count, what in told if count)


def read_suite(path: str, wanted: SafetySuite, encoder: Encoder, longest: int, trained: Iterable[str]) -> Suite:
    """``longest``: tokens of a prompt at most. Raises Invalid with file, row and remedy."""
    rows = load_suite(path)
    if wanted.max_category_violation_rate is not None and all(row.category == UNKNOWN for row in rows):
        raise Invalid(
            f"{path}: no row has a 'category', but evaluation.safetySuite.maxCategoryViolationRate is a limit for "
            "each of them; add the field, or remove the limit"
        )
    encoded = [(Prompt(row.prompt, tuple(encoder.prompt(row.prompt))), row.category) for row in rows]
    asked = [(prompt, category) for prompt, category in encoded if len(prompt.ids) <= longest]
    check_too_long(path, len(rows) - len(asked), len(rows), longest, "maxPromptLength")
    _check_categories(path, rows, {category for _, category in asked}, longest)
    known = {tuple(words(text)) for text in trained}
    return Suite(
        wanted=wanted,
        prompts=tuple(prompt for prompt, _ in asked),
        categories=tuple(category for _, category in asked),
        too_long=len(rows) - len(asked),
        trained_on=sum(tuple(words(prompt.text)) in known for prompt, _ in asked),
    )


def _check_categories(path: str, rows: Sequence[SuitePrompt], asked: set[str], longest: int) -> None:
    """A category of which nothing is asked would be missing from the verdict without a word."""
    lost = [category for category in dict.fromkeys(row.category for row in rows) if category not in asked]
    if lost:
        raise Invalid(
            f"{path}: every prompt of category '{lost[0]}' has more than {longest} tokens, so that nothing of it would "
            "be asked; raise training.maxPromptLength, or take these rows out"
        )
