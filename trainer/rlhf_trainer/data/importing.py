"""From an export to a data set: converted, redacted, pseudonymised, split by prompt cluster, and described."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.data.annotation import SCHEMA_VERSION, parse
from rlhf_trainer.data.documents import Document
from rlhf_trainer.data.findings import Finding, errors
from rlhf_trainer.data.importers import Imported, convert, detect, named
from rlhf_trainer.data.importers.base import Format
from rlhf_trainer.data.pii import pseudonym, redact_row
from rlhf_trainer.data.rows import Row
from rlhf_trainer.data.split import QUARANTINE, assign
from rlhf_trainer.data.text import utf8
from rlhf_trainer.data.validation import PiiPolicy, Policy, validate
from rlhf_trainer.digests import rows_digest

IMPORTER_VERSION = 1


@dataclass(frozen=True)
class Options:
    """``rater_key`` None keeps rater ids as they are; ``previous`` maps prompts of an earlier version to their side."""

    format: str = "auto"
    pii: PiiPolicy = PiiPolicy.REDACT
    rater_key: bytes | None = None
    holdout_fraction: float = 0.2
    previous: Mapping[str, str] | None = None
    parent: str | None = None  # digest of the earlier version


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be written, or the findings that forbid it."""

    rows: list[Row]
    manifest: dict[str, Any]
    findings: list[Finding]


def prepare(document: Document, options: Options) -> Prepared:
    """All or nothing: with one error no rows come back, so that half an export never passes for a data set."""
    known = detect(document.records) if options.format == "auto" else named(options.format)
    if isinstance(known, Finding):
        return Prepared([], {}, document.findings or [known])
    imported = convert(document.records, known)
    rows, replaced = _clean(imported.rows, options)
    rows = _split(rows, options)
    # Rows are counted as they will be written; an error in a record is named by the record's own row.
    checked = validate(list(enumerate(rows, start=1)), Policy(pii=options.pii, previous=options.previous))
    findings = [*document.findings, *imported.findings, *checked.findings]
    if not rows and not errors(findings):
        skipped = ", ".join(f"{n} {reason}" for reason, n in imported.skipped.items())
        findings.append(Finding("PREF006", f"no annotation is left ({skipped or 'no records'})"))
    if errors(findings):
        return Prepared([], {}, findings)
    return Prepared(rows, _manifest(document, known, imported, rows, replaced, options), findings)


def _clean(rows: Sequence[Row], options: Options) -> tuple[list[Row], Counter[str]]:
    replaced: Counter[str] = Counter()
    cleaned: list[Row] = []
    for row in rows:
        if options.pii is PiiPolicy.REDACT:
            row, counts = redact_row(row)
            replaced.update(counts)
            row = {**row, "pii_status": "redacted" if counts else "none_found"}
        rater = row.get("rater_id")
        if options.rater_key is not None and isinstance(rater, str) and rater:
            row = {**row, "rater_id": pseudonym(rater, options.rater_key)}
        cleaned.append(row)
    return cleaned, replaced


def _split(rows: Sequence[Row], options: Options) -> list[Row]:
    """Every valid row with its side; a row that has one keeps it."""
    prompts = {at: found.prompt for at, row in enumerate(rows) if (found := parse(row, at)[0]) is not None}
    pinned = dict(options.previous or {})
    for at, prompt in prompts.items():
        given = rows[at].get("split")
        if given:  # an empty column says nothing
            pinned.setdefault(prompt, given)
    sides = assign(list(prompts.values()), options.holdout_fraction, pinned)
    return [
        {**row, "split": row.get("split") or sides[prompts[at]]} if at in prompts else row
        for at, row in enumerate(rows)
    ]


def _manifest(
    document: Document, known: Format, imported: Imported, rows: list[Row], replaced: Counter[str], options: Options
) -> dict[str, Any]:
    sides = Counter(str(row["split"]) for row in rows)
    return {
        "schemaVersion": SCHEMA_VERSION,
        "importerVersion": IMPORTER_VERSION,
        "source": document.source,
        "sourceBytes": len(document.content),
        "format": known.name,
        "unknown": known.unknown or None,
        "records": len(document.records),
        "rows": len(rows),
        "skipped": dict(sorted(imported.skipped.items())),
        "datasetDigest": rows_digest(rows),
        "parentDigest": options.parent,
        "splits": dict(sorted(sides.items())),
        "quarantined": sides[QUARANTINE],
        "pii": {"policy": options.pii.value, "detectors": ["structured"], "replaced": dict(sorted(replaced.items()))},
        "ratersPseudonymised": options.rater_key is not None,
    }


def to_jsonl(rows: Sequence[Row]) -> bytes:
    return utf8("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))
