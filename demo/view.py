"""What the demo prints: readable live in a terminal and, line by line, in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.status import Status
from rich.table import Table

STATE_STYLE = {"Pass": "green", "Fail": "bold red", "NeedMoreData": "yellow", "Unknown": "dim"}


class View:
    """One per run; `elapsed` counts from its making."""

    def __init__(self, console: Console | None = None) -> None:
        # A log has no width of its own: wide enough for the tables.
        self.console = console or Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def chapter(self, number: int, title: str, why: str) -> None:
        self.console.print()
        self.console.print(Rule(f"[bold]{number}. {title}", align="left"))
        self.console.print(f"[dim]{why}")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"[dim]{self.elapsed:6.0f}s[/] {text}", style=style or None)

    def command(self, line: str) -> None:
        """The command a user would type for the same view."""
        self.console.print(f"        [cyan]$ {line}")

    @contextmanager
    def following(self, what: str) -> Iterator[Follow]:
        if self.console.is_terminal:
            with self.console.status(what) as status:
                yield Follow(self, what, status)
        else:
            yield Follow(self, what, None)

    def verdicts(self, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """The evidence: one row per gate or test, decided on the interval."""
        if not verdicts:
            return
        table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=True, header_style="dim")
        for name in ("  test", "verdict", "n", "estimate", "95% interval", "threshold"):
            table.add_column(name)
        for verdict in verdicts:
            state = str(verdict.get("state", "Unknown"))
            table.add_row(
                f"  {verdict.get('metric', '?')}",
                f"[{STATE_STYLE.get(state, '')}]{state}",
                str(verdict.get("n", "–")),
                number(verdict.get("estimate")),
                interval(verdict),
                number(verdict.get("threshold", verdict.get("margin"))),
            )
        self.console.print(table)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(header_style="bold", show_lines=False)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


class Follow:
    """A line that changes in place on a terminal, and is printed anew at each change elsewhere."""

    def __init__(self, view: View, what: str, status: Status | None) -> None:
        self._view, self._what, self._status, self._last = view, what, status, ""

    def show(self, text: str) -> None:
        if text == self._last:
            return
        self._last = text
        if self._status is not None:
            self._status.update(f"[dim]{self._view.elapsed:6.0f}s[/] {self._what}: {text}")
        else:
            self._view.say(f"{self._what}: {text}")


def number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.3g}"


def interval(verdict: Mapping[str, Any]) -> str:
    """Gates give lower and upper; a rollout's anytime-valid tests give an interval object."""
    bounds = verdict.get("interval") or verdict
    low, high = bounds.get("lower"), bounds.get("upper")
    if low is None and high is None:
        return "–"
    return f"[{number(low)}, {number(high)}]".replace("[", r"\[")
