"""What can be wrong with preference data: one code, severity and remedy each, the same in every tool and message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """An error makes the data invalid (exit 11); a warning is shown and kept."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Rule:
    severity: Severity
    title: str
    remedy: str


_E, _W = Severity.ERROR, Severity.WARNING

RULES: dict[str, Rule] = {
    "PREF001": Rule(_E, "required column missing or empty", "fill it in, or drop the row"),
    "PREF002": Rule(_E, "preference not one of a, b, tie, both_bad", "correct the value, or drop the row"),
    "PREF003": Rule(
        _E,
        "roles of the prompt do not alternate or do not end with user, or a response has other turns than assistant's",
        "cut the prompt after a user turn, and leave the assistant's turns alone in the responses",
    ),
    "PREF004": Rule(_E, "optional column of the wrong type or range", "correct the value, or leave the column out"),
    "PREF005": Rule(_E, "line is not one JSON object", "write one JSON object per line, in UTF-8"),
    "PREF006": Rule(_E, "file unreadable or empty", "check the address, the mounted claim and the permissions"),
    "PREF010": Rule(_E, "both responses are the same text", "drop the row: nothing was compared"),
    "PREF011": Rule(_W, "pairs longer than maxTokens", "raise maxLength, or shorten the prompts"),
    "PREF020": Rule(_E, "one annotation_id with different content", "give every annotation its own id"),
    "PREF021": Rule(_W, "duplicate annotations or near-duplicate pairs", "drop the copies"),
    "PREF030": Rule(_E, "holdout prompts also in train", "let `data import` assign the split by prompt cluster"),
    "PREF031": Rule(_E, "prompt left the holdout of an earlier version", "import with --previous, which keeps sides"),
    "PREF040": Rule(_W, "a rater contradicts themself", "ask the rater, or drop the pairs"),
    "PREF041": Rule(_W, "overall score contradicts its aspects", "check how the overall score was exported"),
    "PREF050": Rule(_W, "rater prefers a position", "shuffle which response is shown first; check the rater"),
    "PREF051": Rule(_W, "rater answers too fast to have read", "check the rater with gold items"),
    "PREF052": Rule(_E, "rater fails the gold items", "leave the rater's rows out, or train the rater"),
    "PREF060": Rule(_E, "personal data", "import with --pii redact"),
    "PREF070": Rule(_W, "cohort too small to report", "collect more, or merge cohorts"),
    "PREF080": Rule(_E, "digest differs from what is pinned", "restore the data, or pin the new digest on purpose"),
    "PREF090": Rule(_E, "format not recognised", "export in an accepted format, or name it with --format"),
    "PREF091": Rule(_E, "record does not fit its format", "correct the record, or drop it"),
}


@dataclass(frozen=True)
class Finding:
    """One thing wrong: the rule, where it lies (1-based row and field, None for the whole file) and the evidence."""

    code: str
    message: str
    row: int | None = None
    field: str | None = None
    severity: Severity = Severity.ERROR

    @property
    def remedy(self) -> str:
        return RULES[self.code].remedy

    def line(self, source: str) -> str:
        """``file:row: CODE severity: message; remedy`` for people."""
        where = f"{source}:{self.row}" if self.row is not None else source
        return f"{where}: {self.code} {self.severity}: {self.message}; {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "row": self.row,
            "field": self.field,
            "message": self.message,
            "remedy": self.remedy,
        }


def finding(
    code: str, message: str, row: int | None = None, field: str | None = None, *, error: bool | None = None
) -> Finding:
    """A finding at its rule's severity; ``error`` overrides it where a share decides."""
    severity = RULES[code].severity if error is None else (Severity.ERROR if error else Severity.WARNING)
    return Finding(code, message, row, field, severity)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    return [each for each in findings if each.severity is Severity.ERROR]
