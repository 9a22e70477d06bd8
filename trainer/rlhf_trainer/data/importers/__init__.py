"""Formats of preference data into annotation rows: `detect` names the format, `convert` reads every record of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_trainer.data.findings import Finding, finding
from rlhf_trainer.data.importers import argilla, helpsteer, hh, label_studio, trl, ultrafeedback
from rlhf_trainer.data.importers.base import Converted, Format, identity
from rlhf_trainer.data.rows import Row, RowProblem

_SAMPLE = 20  # records that must look alike before a format is believed


def _canonical(row: Row) -> Converted:
    return Converted([row if row.get("annotation_id") else {"annotation_id": identity("row", row), **row}])


CANONICAL = Format(
    "annotations",
    "prompt, response_a, response_b, preference",
    lambda row: {"prompt", "response_a", "response_b", "preference"} <= set(row),
    _canonical,
)
# From the most to the least particular: the first match is the format.
FORMATS: tuple[Format, ...] = (
    CANONICAL,
    *label_studio.FORMATS,
    *argilla.FORMATS,
    *reversed(ultrafeedback.FORMATS),
    *helpsteer.FORMATS,
    *hh.FORMATS,
    *trl.FORMATS,
)
_BY_NAME = {each.name: each for each in FORMATS}


@dataclass(frozen=True)
class Imported:
    """Annotation rows, what was skipped by reason, and the records that were refused."""

    format: Format
    rows: list[Row]
    skipped: Counter[str]
    findings: list[Finding]


def detect(records: Sequence[tuple[int, Row]]) -> Format | Finding:
    """The first format that most of the first records match, so that a bad record among them is named by its row;
    else PREF090 with what was seen."""
    sample = [row for _, row in records[:_SAMPLE]]
    for known in FORMATS:
        if 2 * sum(known.matches(row) for row in sample) > len(sample):
            return known
    seen = sorted({str(column) for row in sample for column in row})
    accepted = "; ".join(f"{known.name}: {known.columns}" for known in FORMATS)
    return finding("PREF090", f"format not recognised; accepted: {accepted}; columns seen: {', '.join(seen) or 'none'}")


def named(name: str) -> Format | Finding:
    if name in _BY_NAME:
        return _BY_NAME[name]
    return finding("PREF090", f"format '{name}' not recognised; accepted: auto, {', '.join(_BY_NAME)}")


def convert(records: Sequence[tuple[int, Row]], known: Format) -> Imported:
    """Every record through the format; a refused record is a finding that names its row, never an exception."""
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    findings: list[Finding] = []
    for number, record in records:
        try:
            converted = known.convert(record)
        except RowProblem as problem:
            findings.append(finding("PREF091", f"{known.name}: {problem}", number))
            continue
        rows += converted.rows
        skipped.update(converted.skipped)
    return Imported(known, rows, skipped, findings)
