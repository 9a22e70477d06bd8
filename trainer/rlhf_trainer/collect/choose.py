"""Which candidate pairs are labelled: most by disagreement of the reward ensemble, some by lot. Pure.

The lot matters more than the disagreement: only pairs with a known chance of being chosen allow unbiased estimates of
agreement, win rate or drift afterwards, and an ensemble that is wrong together disagrees about nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rlhf_trainer.randomness import Stream, generator


class Reason(StrEnum):
    DISAGREEMENT = "disagreement"
    UNIFORM = "uniform"


@dataclass(frozen=True)
class Chosen:
    """``probability`` is the chance this candidate had of being chosen, given the candidates: weigh by its inverse."""

    index: int
    reason: Reason
    probability: float


def choose(disagreement: Sequence[float], count: int, uniform_share: float, seed: int) -> list[Chosen]:
    """``count`` of the candidates, in their order: the most disagreed about, and ``uniform_share`` of them drawn
    without replacement from all the others. Raises ValueError when there are fewer candidates than asked for."""
    total = len(disagreement)
    if not 0 < count <= total:
        raise ValueError(f"{count} pairs were asked for and there are {total} candidates; sample more prompts")
    if not 0.0 <= uniform_share <= 1.0:
        raise ValueError(f"the uniform share is {uniform_share}; give a number from 0 to 1")
    drawn = round(uniform_share * count)
    ranked = sorted(range(total), key=lambda index: (-disagreement[index], index))
    top, rest = ranked[: count - drawn], sorted(ranked[count - drawn :])
    order = generator(seed, Stream.COLLECTION).permutation(len(rest))
    lots = [rest[position] for position in order[:drawn]]
    chance = drawn / len(rest) if rest else 1.0
    chosen = [Chosen(index, Reason.DISAGREEMENT, 1.0) for index in top]
    chosen += [Chosen(index, Reason.UNIFORM, chance) for index in lots]
    return sorted(chosen, key=lambda one: one.index)
