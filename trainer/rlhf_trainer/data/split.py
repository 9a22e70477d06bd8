"""The holdout: which prompts are kept from training, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

R = TypeVar("R")


def held_out(prompt: str, fraction: float) -> bool:
    """True for about ``fraction`` of prompts, by a hash of the prompt alone.

    A prompt keeps its side when rows are added, removed or reordered, and whatever the seed, so that no later
    version of a data set leaks an old holdout into training.
    """
    normal = " ".join(prompt.casefold().split())
    number = int.from_bytes(hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return number < fraction * 2**64


def split(records: Iterable[R], prompt_of: Callable[[R], str], fraction: float) -> tuple[list[R], list[R]]:
    """(training, holdout), each in the order given; all rows of one prompt are on one side."""
    training: list[R] = []
    holdout: list[R] = []
    for record in records:
        (holdout if held_out(prompt_of(record), fraction) else training).append(record)
    return training, holdout
