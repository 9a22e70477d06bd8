"""The holdout: which prompts are kept from training, for ever.

Near duplicates of a prompt share its side, or the holdout would measure memory. The side of a prompt hangs on its
cluster alone, not on rows, order or seed; and a side that an earlier version of the data gave (its ``split`` column)
is kept, whatever joins the cluster later.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rlhf_trainer.data.near_duplicates import clusters
from rlhf_trainer.data.text import encoded

R = TypeVar("R")

TRAIN, HOLDOUT, QUARANTINE = "train", "holdout", "quarantine"


def held_out(prompt: str, fraction: float) -> bool:
    """True for about ``fraction`` of prompts, by a hash of the prompt alone.

    A prompt keeps its side when rows are added, removed or reordered, and whatever the seed, so that no later
    version of a data set leaks an old holdout into training.
    """
    return _number(_normal(prompt)) < fraction * 2**64


def split(
    records: Iterable[R],
    prompt_of: Callable[[R], str],
    fraction: float,
    side_of: Callable[[R], str | None] | None = None,
) -> tuple[list[R], list[R]]:
    """(training, holdout), each in the order given; all rows of one prompt and of its near duplicates are on one side.

    ``side_of`` gives the side a record already has (its ``split`` column); quarantined records are on neither.
    """
    rows = list(records)
    named = ((prompt_of(row), side_of(row)) for row in rows) if side_of is not None else ()
    pinned = _given((prompt, side) for prompt, side in named if side is not None)
    sides = assign([prompt_of(row) for row in rows], fraction, pinned)
    training = [row for row in rows if sides[prompt_of(row)] == TRAIN]
    return training, [row for row in rows if sides[prompt_of(row)] == HOLDOUT]


def assign(prompts: Sequence[str], fraction: float, pinned: Mapping[str, str] | None = None) -> dict[str, str]:
    """Prompt → side. A pinned prompt keeps its side (val and audit count as holdout) and gives it to its cluster.

    Where a new prompt joins clusters of both sides it is ``quarantine``: in training it would leak the holdout, in
    the holdout it would be leaked by training. ``pinned`` may hold prompts of earlier versions that are not in
    ``prompts`` any more.
    """
    given = _given((pinned or {}).items())
    spelled = list(dict.fromkeys([*map(_normal, prompts), *given]))
    members: dict[int, list[str]] = defaultdict(list)
    for prompt, cluster in zip(spelled, clusters(spelled), strict=True):
        members[cluster].append(prompt)
    decided: dict[str, str] = {}
    for cluster_prompts in members.values():
        fallen = {given[prompt] for prompt in cluster_prompts if prompt in given} - {QUARANTINE}
        if len(fallen) > 1:
            side = QUARANTINE
        else:
            side = next(iter(fallen), None) or (HOLDOUT if _cluster_held_out(cluster_prompts, fraction) else TRAIN)
        decided.update((prompt, given.get(prompt, side)) for prompt in cluster_prompts)
    return {prompt: decided[_normal(prompt)] for prompt in prompts}


def _given(pinned: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Prompt → side, quarantine for one on both: whatever the order of rows, what one holds out is not trained on."""
    sides: dict[str, str] = {}
    for prompt, name in pinned:
        side, normal = _side(name), _normal(prompt)
        sides[normal] = side if sides.get(normal, side) == side else QUARANTINE
    return sides


def _side(given: str) -> str:
    return given if given in (TRAIN, QUARANTINE) else HOLDOUT


def _cluster_held_out(prompts: Sequence[str], fraction: float) -> bool:
    """By one member, chosen by a second hash: the least of the first hashes would favour the holdout."""
    return held_out(min(prompts, key=lambda prompt: hashlib.sha256(b"cluster\0" + encoded(prompt)).digest()), fraction)


def _normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _number(normal: str) -> int:
    return int.from_bytes(hashlib.sha256(encoded(normal)).digest()[:8], "big")
