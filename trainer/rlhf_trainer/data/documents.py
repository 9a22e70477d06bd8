"""A file of records: JSONL, or a JSON array as labelling tools export it. Nothing in it can raise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from rlhf_trainer.data.access import read_bytes
from rlhf_trainer.data.findings import Finding, finding
from rlhf_trainer.data.rows import Row
from rlhf_trainer.digests import row_digest
from rlhf_trainer.exits import Invalid


@dataclass(frozen=True)
class Document:
    """Records with their 1-based row (the line of JSONL, the element of an array), and what could not be read."""

    source: str
    content: bytes
    records: list[tuple[int, Row]]
    findings: list[Finding]


def read_document(uri: str) -> Document:
    """Reads the whole file; an unreadable or empty one has PREF006 as its only finding."""
    try:
        content = read_bytes(uri)
    except Invalid as refusal:
        return Document(uri, b"", [], [finding("PREF006", refusal.message.split(": ", 1)[-1].split(";")[0])])
    return parse_document(uri, content)


def parse_document(source: str, content: bytes) -> Document:
    stripped = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not stripped:
        return Document(source, content, [], [finding("PREF006", "the file is empty")])
    if stripped.startswith(b"["):
        return _array(source, content, stripped)
    return _lines(source, content)


def _array(source: str, content: bytes, stripped: bytes) -> Document:
    try:
        values = _loads(stripped)
        row_digest({"": values})
    except (ValueError, RecursionError) as error:
        # A JSONL file whose first line is a list ends here too: its second line is the error.
        lines = _lines(source, content)
        return lines if lines.records else Document(source, content, [], [_bad(None, f"not JSON ({error})")])
    numbered = list(enumerate(values, start=1))
    return _checked(source, content, numbered, [])


def _lines(source: str, content: bytes) -> Document:
    values: list[tuple[int, Any]] = []
    findings: list[Finding] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, _loads(line)))
        except (ValueError, RecursionError) as error:
            findings.append(_bad(number, f"not JSON ({error})"))
    return _checked(source, content, values, findings)


def _checked(source: str, content: bytes, values: list[tuple[int, Any]], findings: list[Finding]) -> Document:
    findings += [_bad(number, f"a JSON {type(v).__name__}") for number, v in values if not isinstance(v, dict)]
    records = [(number, value) for number, value in values if isinstance(value, dict)]
    if not records and not findings:
        findings.append(finding("PREF006", "the file holds no records"))
    return Document(source, content, records, sorted(findings, key=lambda found: found.row or 0))


def _bad(number: int | None, why: str) -> Finding:
    return finding("PREF005", why if len(why) < 200 else why[:200] + "…", number)


def _loads(text: bytes) -> Any:
    """The value, once it is known that it can be written again: a number such as 1e999 can not."""
    value = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    if isinstance(value, dict):
        row_digest(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
