"""What happened, when, and on what evidence: kept while the demo plays, printed and drawn at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    at: float  # seconds since the demo began
    what: str
    outcome: str
    evidence: str
    digest: str
    look: str  # the command that shows it


@dataclass(frozen=True)
class RolloutPoint:
    """One observed change of a rollout's status."""

    at: float
    phase: str
    stage: int
    weight: float
    revision: str


@dataclass
class Story:
    entries: list[Entry] = field(default_factory=list)
    timeline: dict[str, list[RolloutPoint]] = field(default_factory=dict)
    training: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # job -> metrics.jsonl rows
    win_rates: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # judge -> verdict-like
    served: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # rollout act -> oracle's count of answers

    def add(self, at: float, what: str, outcome: str, evidence: str, digest: str, look: str) -> None:
        self.entries.append(Entry(at, what, outcome, evidence, digest, look))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def short(digest: str | None) -> str:
    """sha256:0123456789ab… as people compare it."""
    return (digest or "–").removeprefix("sha256:")[:12]


def best_evidence(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The verdict that decided: the first that failed, else the first of all."""
    if not verdicts:
        return "–"
    verdict = next((v for v in verdicts if v.get("state") == "Fail"), verdicts[0])
    parts = [f"{verdict.get('metric')} {verdict.get('state')}"]
    if verdict.get("estimate") is not None:
        parts.append(f"{float(verdict['estimate']):.3f}")
    bounds = verdict.get("interval") or verdict
    if bounds.get("lower") is not None and bounds.get("upper") is not None:
        parts.append(f"[{float(bounds['lower']):.3f}, {float(bounds['upper']):.3f}]")
    if verdict.get("eValue") is not None and verdict.get("state") == "Fail":
        parts.append(f"e-value {float(verdict['eValue']):.3g} over {float(verdict['bound']):.3g}")
    parts.append(f"n={verdict.get('n')}")
    return " ".join(parts)
