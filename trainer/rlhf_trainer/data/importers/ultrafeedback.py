"""UltraFeedback: completions scored by a model, as published (one row per instruction) and binarized."""

from __future__ import annotations

import math
from typing import Any

from rlhf_trainer.data.importers.base import (
    Converted,
    Format,
    common_turns,
    compact,
    has_list,
    has_text,
    identity,
    joined,
    messages,
    number,
    text,
)
from rlhf_trainer.data.rows import Row, RowProblem

_POINTS_PER_STRENGTH = 3.0  # overall scores go from 1 to 10, strength from 0 to 3


def convert(row: Row) -> Converted:
    """The best completion against each other one; of equal scores the first counts as best, and they tie."""
    prompt, completions = text(row, "instruction"), row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        return Converted(skipped=["fewer than two completions"])
    read = [_completion(completion, at) for at, completion in enumerate(completions)]
    best = max(range(len(read)), key=lambda at: (read[at]["score"], -at))
    rows = []
    for at, other in enumerate(read):
        if at != best:
            pair = _pair("ultrafeedback", row, at, read[best]["score"], other["score"])
            aspects = {
                name: {"a": value, "b": other["aspects"][name]}
                for name, value in read[best]["aspects"].items()
                if name in other["aspects"]
            }
            texts = {"prompt": prompt, "response_a": read[best]["response"], "response_b": other["response"]}
            models = {"model_a": read[best]["model"], "model_b": other["model"]}
            rows.append(compact({**pair, **texts, "aspects": aspects, **models}))
    return Converted(rows)


def convert_binarized(row: Row) -> Converted:
    prompt, a, b = common_turns(*(messages(row.get(side), side) for side in ("chosen", "rejected")))
    scores = [number(row.get(name), name) for name in ("score_chosen", "score_rejected")]
    texts = {"prompt": prompt, "response_a": joined(a), "response_b": joined(b)}
    return Converted([compact({**_pair("ultrafeedback-binarized", row, "", *scores), **texts})])


def _pair(name: str, row: Row, part: object, score_a: float, score_b: float) -> Row:
    gap = score_a - score_b
    return {
        "annotation_id": identity(name, row, part),
        "preference": "tie" if gap == 0 else "a" if gap > 0 else "b",
        "strength": min(3.0, round(abs(gap) / _POINTS_PER_STRENGTH, 3)),
        "score_a": score_a,
        "score_b": score_b,
        "rater_type": "model",
    }


def _completion(completion: Any, at: int) -> dict[str, Any]:
    if not isinstance(completion, dict):
        raise RowProblem(f"field 'completions.{at}' is not an object; export the data set as it was published")
    aspects = {}
    annotations = completion.get("annotations")
    for name, given in (annotations if isinstance(annotations, dict) else {}).items():
        rating = _rating(given)
        if rating is not None:
            aspects[str(name)] = rating
    return {
        "response": text(completion, "response"),
        "score": number(completion.get("overall_score"), f"completions.{at}.overall_score"),
        "aspects": aspects,
        "model": completion.get("model"),
    }


def _rating(given: Any) -> float | None:
    """The number of ``{"Rating": "4"}``; "N/A" is none, and what no JSON can hold neither."""
    try:
        rating = float(given["Rating"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return rating if math.isfinite(rating) else None


FORMATS = (
    Format(
        "ultrafeedback",
        "instruction, completions[{response, overall_score, annotations}]",
        lambda row: has_text(row, "instruction") and has_list(row, "completions"),
        convert,
        "order, and the rater is a model",
    ),
    Format(
        "ultrafeedback-binarized",
        "chosen, rejected (lists of messages), score_chosen, score_rejected",
        lambda row: has_list(row, "chosen", "rejected") and "score_chosen" in row and "score_rejected" in row,
        convert_binarized,
        "order, and the rater is a model; the rejected response was drawn at random",
    ),
)
