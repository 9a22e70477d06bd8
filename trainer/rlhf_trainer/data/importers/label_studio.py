"""Label Studio's JSON export of a pairwise project: tasks with their annotations.

JSON_MIN and CSV lose who annotated and what was skipped, so they are refused. Skipped annotations are exported too
(``was_cancelled``) and must not count.
"""

from __future__ import annotations

from typing import Any

from rlhf_trainer.data.importers.base import Converted, Format, compact, text
from rlhf_trainer.data.rows import Row, RowProblem, is_number

_SELECTED = {"left": "a", "right": "b", "none": "tie"}


def convert(row: Row) -> Converted:
    """One annotation per finished answer; a ground truth answer is the gold of the task's other answers."""
    data, annotations = row.get("data"), row.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise RowProblem("a task needs 'data' and 'annotations'; export as JSON, not as JSON_MIN or CSV")
    pair = {
        "prompt": text(data, "prompt"),
        "response_a": text(data, "answer1"),
        "response_b": text(data, "answer2"),
    }
    rows: list[Row] = []
    skipped: list[str] = []
    truths = {choice for each in annotations if _is_truth(each) and (choice := _selected(each)) is not None}
    if len(truths) > 1:
        raise RowProblem("two ground truth annotations disagree; keep one")
    gold = next(iter(truths), None)
    for each in annotations:
        if not isinstance(each, dict):
            raise RowProblem("an annotation is not an object; export the project again")
        choice = _selected(each)
        if each.get("was_cancelled"):
            skipped.append("skipped by the annotator")
        elif choice is None:
            skipped.append("no pairwise result")
        else:
            rows.append(_annotation(row, each, pair, choice, None if _is_truth(each) else gold))
    if not annotations:
        skipped.append("not annotated")
    return Converted(rows, skipped)


def refuse_flat(_row: Row) -> Converted:
    raise RowProblem("JSON_MIN and CSV exports lose raters and skipped answers; export the project as JSON")


def _annotation(task: Row, each: Row, pair: Row, choice: str, gold: str | None) -> Row:
    created = each.get("created_at")
    return compact(
        {
            "annotation_id": f"label-studio-{task.get('id')}-{each.get('id')}",
            **pair,
            "preference": choice,
            "rater_id": _rater(each.get("completed_by")),
            "rater_type": "human",
            "shown_first": "a",  # the left answer is read first
            "created_at": created if isinstance(created, str) else None,
            "duration_s": each["lead_time"] if is_number(each.get("lead_time")) else None,
            "is_gold": True if gold is not None else None,
            "gold_preference": gold,
        }
    )


def _is_truth(each: Any) -> bool:
    return isinstance(each, dict) and each.get("ground_truth") is True and not each.get("was_cancelled")


def _selected(each: Any) -> str | None:
    results = each.get("result") if isinstance(each, dict) else None
    for result in results if isinstance(results, list) else []:
        value = result.get("value") if isinstance(result, dict) and result.get("type") == "pairwise" else None
        selected = value.get("selected") if isinstance(value, dict) else None
        if isinstance(selected, str) and selected in _SELECTED:
            return _SELECTED[selected]
    return None


def _rater(completed_by: Any) -> str | None:
    """An id, or of a full user record its id or e-mail."""
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("id", completed_by.get("email"))
    return None if completed_by is None else str(completed_by)


FORMATS = (
    Format(
        "label-studio",
        "data{prompt, answer1, answer2}, annotations[] (the JSON export)",
        lambda row: isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list),
        convert,
    ),
    Format(
        "label-studio-min",
        "refused: export as JSON instead",
        lambda row: {"annotation_id", "annotator", "lead_time"} <= set(row),
        refuse_flat,
    ),
)
