"""How every benchmark reports: a table for people and a JSON beside it for machines.

    report = Report("operator_scale", "Operator on etcd and kube-apiserver")
    report.add("create to children p99", 0.21, "s", samples=1000, spread="p50 0.04")
    report.write()          # benchmarks/results/operator_scale.{md,json}, and prints the table

Figures are good for ratios on one machine; each row therefore carries cores, versions and commit.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("kopf", "kubernetes", "pydantic", "torch", "transformers", "deepspeed", "scipy")


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    unit: str
    samples: int
    spread: str  # how the samples scatter, in words with units: "IQR 0.8 to 1.1 s", "95% CI 0.71 to 0.83"
    cores: int
    versions: dict[str, str]
    commit: str


class Report:
    def __init__(
        self,
        name: str,
        title: str,
        packages: tuple[str, ...] = PACKAGES,
        *,
        checkout: Path = RESULTS.parent,
        rerun: str | None = None,
    ) -> None:
        """`checkout`: where the measured code is; `rerun`: the command, if not the benchmark's name alone."""
        self.name, self.title = name, title
        self._rerun = rerun or f"python -m benchmarks {name}"
        self._cores = len(os.sched_getaffinity(0))
        self._versions = {"python": platform.python_version(), **versions(packages)}
        self._commit = commit(checkout)
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(self, name: str, value: float, unit: str, *, samples: int, spread: str = "") -> None:
        self.rows.append(Row(name, value, unit, samples, spread, self._cores, self._versions, self._commit))

    def keep(self, prefix: str) -> None:
        """Rows as the last written report has them, with the commit of their run, for what was not measured anew."""
        written = RESULTS / f"{self.name}.json"
        rows = [Row(**row) for row in json.loads(written.read_text())] if written.exists() else []
        self.rows += [row for row in rows if row.name.startswith(prefix)]

    def note(self, text: str) -> None:
        """A sentence under the table: what was compared, what the figure does not say."""
        self.notes.append(text)

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", "| what | value | unit | samples | spread |", "|---|---:|---|---:|---|"]
        lines += [f"| {r.name} | {r.value:.4g} | {r.unit} | {r.samples} | {r.spread} |" for r in self.rows]
        lines += ["", *(f"{note}\n" for note in self.notes)]
        described = ", ".join(f"{name} {version}" for name, version in self._versions.items())
        lines += [f"{self._cores} core{'s' * (self._cores != 1)}; {described}; {self._commits()}.", ""]
        lines += [f"Rerun: `{self._rerun}`", ""]
        return "\n".join(lines)

    def _commits(self) -> str:
        rows = Counter(row.commit for row in self.rows)
        if len(rows) <= 1:
            return f"commit {self._commit}"
        return "commits " + ", ".join(f"{name} ({count} rows)" for name, count in rows.items())

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        text = self.markdown()
        (RESULTS / f"{self.name}.md").write_text(text)
        (RESULTS / f"{self.name}.json").write_text(json.dumps([asdict(r) for r in self.rows], indent=1) + "\n")
        print(text)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(checkout: Path) -> str:
    """Short commit of the checkout, with + when it was changed; "unknown" outside git."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
