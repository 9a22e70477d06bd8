"""One row per pair: what its annotations together say. The reward model can learn from these soft labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rlhf_trainer.data.annotation import Annotation
from rlhf_trainer.data.dawid_skene import Aggregate
from rlhf_trainer.data.rows import UNKNOWN, Row


def pair_rows(annotations: Sequence[Annotation], aggregate: Aggregate) -> list[Row]:
    """Rows that `load_preferences` reads, in order of first appearance: ``probability_a`` is the aggregate's, in the
    order of responses of the pair's first annotation. Pairs that were only called both_bad are left out."""
    pairs: dict[str, list[Annotation]] = defaultdict(list)
    for each in annotations:
        pairs[each.pair_id].append(each)
    return [
        _row(identity, own, aggregate.probability[identity])
        for identity, own in pairs.items()
        if identity in aggregate.probability
    ]


def entropy_bits(probability: float) -> float:
    """How undecided a pair is: 0 when sure, 1 at one half."""
    return -sum(p * math.log2(p) for p in (probability, 1 - probability) if p > 0)


def _row(identity: str, own: Sequence[Annotation], probability_first: float) -> Row:
    shown = own[0]
    probability = 1 - probability_first if shown.flipped else probability_first
    strengths = [each.strength for each in own if each.strength is not None]
    cohorts = {each.cohort for each in own}
    row: Row = {
        "pair_id": identity,
        "prompt": shown.prompt,
        "response_a": shown.response_a,
        "response_b": shown.response_b,
        "preference": "tie" if probability == 0.5 else "a" if probability > 0.5 else "b",
        "probability_a": round(probability, 6),
        "entropy": round(entropy_bits(probability), 6),
        "n_annotations": len(own),
        "cohort": cohorts.pop() if len(cohorts) == 1 else UNKNOWN,
    }
    if strengths:
        row["strength"] = round(sum(strengths) / len(strengths), 6)
    if shown.split is not None:
        row["split"] = shown.split
    return row
