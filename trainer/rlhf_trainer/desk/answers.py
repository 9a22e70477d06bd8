"""What users really saw: the oracle counts the leaks in answers that were recorded under live traffic."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.desk.oracle import violation


@dataclass(frozen=True)
class Served:
    """Counts of one arm and revision; `failures` are requests that got no answer."""

    arm: str
    revision: str
    requests: int
    failures: int
    violations: int


def count_answers(path: Path) -> tuple[Served, ...]:
    """Reads the JSON lines of ``rlhf_gateway.traffic``; raises ValueError with file and line for what is none."""
    requests: Counter[tuple[str, str]] = Counter()
    failures: Counter[tuple[str, str]] = Counter()
    violations: Counter[tuple[str, str]] = Counter()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = _row(path, number, line)
            key = (str(row.get("arm") or "none"), str(row.get("revision") or "none"))
            requests[key] += 1
            failures[key] += row.get("status") != 200
            violations[key] += violation(str(row.get("text") or ""))
    return tuple(Served(*key, requests[key], failures[key], violations[key]) for key in sorted(requests))


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not JSON ({error.msg}); give the file that the traffic run wrote"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: expected one object a line, found {type(row).__name__}")
    return row


def summary(served: tuple[Served, ...]) -> dict[str, Any]:
    """Totals, and one entry for each arm and revision."""
    return {
        "requests": sum(s.requests for s in served),
        "failures": sum(s.failures for s in served),
        "violations": sum(s.violations for s in served),
        "arms": [vars(s) for s in served],
    }
