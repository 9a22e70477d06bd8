"""What changed between two versions of a data set: rows, labels, sides of the holdout, and who labelled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.data.agreement import Metric, krippendorff_alpha
from rlhf_trainer.data.annotation import Annotation
from rlhf_trainer.data.report import labels_of
from rlhf_trainer.data.text import normal

_FLOOR = 1e-4  # of a share: PSI of a rater who came or left stays finite


@dataclass(frozen=True)
class Difference:
    """Annotation ids by what happened to them; prompts by where they moved."""

    added: list[str]
    removed: list[str]
    relabelled: list[str]
    edited: list[str]  # same id, other content, same label
    unchanged: int
    moved: list[tuple[str, str, str]]  # prompt, old split, new split
    flip_rate: float | None  # of the annotations in both
    rater_shift: float  # population stability index of the raters' shares
    cohort_shift: float
    alpha: tuple[float | None, float | None]  # old, new

    @property
    def left_holdout(self) -> list[str]:
        """Prompts once held out that are trained on now: the holdout is worth nothing for them."""
        return [prompt for prompt, old, new in self.moved if old not in ("train", "quarantine") and new == "train"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "added": self.added,
            "removed": self.removed,
            "relabelled": self.relabelled,
            "edited": self.edited,
            "unchanged": self.unchanged,
            "moved": [{"prompt": prompt, "from": old, "to": new} for prompt, old, new in self.moved],
            "leftHoldout": len(self.left_holdout),
            "flipRate": self.flip_rate,
            "raterShift": round(self.rater_shift, 4),
            "cohortShift": round(self.cohort_shift, 4),
            "krippendorffAlpha": {"old": self.alpha[0], "new": self.alpha[1]},
        }


def difference(old: Sequence[Annotation], new: Sequence[Annotation]) -> Difference:
    """Annotations are matched by id, and those without a partner by pair and rater (an export may renumber)."""
    matched, removed, added = match(old, new)
    relabelled = [after.annotation_id for before, after in matched if before.choice != after.choice]
    edited = [
        after.annotation_id
        for before, after in matched
        if before.choice == after.choice and _content(before) != _content(after)
    ]
    return Difference(
        added=sorted(each.annotation_id for each in added),
        removed=sorted(each.annotation_id for each in removed),
        relabelled=sorted(relabelled),
        edited=sorted(edited),
        unchanged=len(matched) - len(relabelled) - len(edited),
        moved=moves(old, new),
        flip_rate=len(relabelled) / len(matched) if matched else None,
        rater_shift=stability_index(_shares(old, lambda each: each.rater_id), _shares(new, lambda each: each.rater_id)),
        cohort_shift=stability_index(_shares(old, lambda each: each.cohort), _shares(new, lambda each: each.cohort)),
        alpha=(_alpha(old), _alpha(new)),
    )


def match(
    old: Sequence[Annotation], new: Sequence[Annotation]
) -> tuple[list[tuple[Annotation, Annotation]], list[Annotation], list[Annotation]]:
    """(matched pairs, left over of old, left over of new)."""
    keys: tuple[Callable[[Annotation], Hashable], ...] = (
        lambda each: each.annotation_id,
        lambda each: (each.pair_id, each.rater_id),
    )
    matched: list[tuple[Annotation, Annotation]] = []
    before, after = list(old), list(new)
    for key in keys:
        waiting: dict[Hashable, list[Annotation]] = {}
        for each in before:
            waiting.setdefault(key(each), []).append(each)
        rest = []
        for each in after:
            partners = waiting.get(key(each))
            if partners:
                matched.append((partners.pop(0), each))
            else:
                rest.append(each)
        before, after = [each for partners in waiting.values() for each in partners], rest
    return matched, before, after


def moves(old: Sequence[Annotation], new: Sequence[Annotation]) -> list[tuple[str, str, str]]:
    before = {normal(each.prompt): each.split for each in old if each.split is not None}
    after = {normal(each.prompt): each.split for each in new if each.split is not None}
    return sorted(
        (prompt, side, after[prompt]) for prompt, side in before.items() if prompt in after and after[prompt] != side
    )


def stability_index(old: Mapping[Hashable, float], new: Mapping[Hashable, float]) -> float:
    """Population stability index: sum of (new - old) ln(new / old) over all groups; 0 when the shares are equal."""
    total = 0.0
    for group in set(old) | set(new):
        before, after = (max(shares.get(group, 0.0), _FLOOR) for shares in (old, new))
        total += (after - before) * math.log(after / before)
    return total


def _shares(rows: Sequence[Annotation], key: Callable[[Annotation], Hashable]) -> dict[Hashable, float]:
    counts = Counter(key(each) for each in rows)
    return {group: count / len(rows) for group, count in counts.items()}


def _alpha(rows: Sequence[Annotation]) -> float | None:
    found = krippendorff_alpha(labels_of(rows), Metric.ORDINAL)
    return None if found is None else round(found.estimate, 4)


def _content(each: Annotation) -> tuple[Any, ...]:
    return each.pair_id, each.strength, each.cohort, each.gold_choice, dict(each.aspects), each.safety_a, each.safety_b
