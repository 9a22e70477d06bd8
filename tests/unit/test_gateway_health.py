"""Ejection: a refused connection at once, anything softer after a streak, and back by one good probe."""

from __future__ import annotations

import pytest

from rlhf_gateway.health import UNWELL_PROBES, HealthTable
from rlhf_gateway.upstream import FailureKind


def test_a_refused_connection_ejects_at_once_and_one_good_probe_brings_back() -> None:
    changes: list[tuple[str, bool]] = []
    table = HealthTable(on_change=lambda revision, ejected: changes.append((revision, ejected)))
    table.note("rev", "dead")
    assert table.ejected("rev")
    table.note("rev", "dead")
    table.note("rev", "alive")
    assert not table.ejected("rev")
    assert changes == [("rev", True), ("rev", False)]


def test_softer_trouble_needs_a_streak() -> None:
    table = HealthTable()
    for _ in range(3):
        for _ in range(UNWELL_PROBES - 1):
            table.note("rev", "unwell")
        assert not table.ejected("rev")
        table.note("rev", "alive")
    for _ in range(UNWELL_PROBES):
        table.note("rev", "unwell")
    assert table.ejected("rev")


def test_a_dead_revision_that_is_merely_unwell_stays_out() -> None:
    table = HealthTable()
    table.note("rev", "dead")
    table.note("rev", "unwell")
    assert table.ejected("rev")


@pytest.mark.parametrize(
    ("kind", "times", "ejected"),
    [("refused", 1, True), ("unreachable", 1, False), ("unreachable", UNWELL_PROBES, True), ("timeout", 9, False),
     ("disconnected", 9, False), ("oversized", 9, False)],
)  # fmt: skip
def test_only_failures_to_connect_say_something_about_the_endpoint(
    kind: FailureKind, times: int, ejected: bool
) -> None:
    table = HealthTable()
    for _ in range(times):
        table.note_failure("rev", kind)
    assert table.ejected("rev") is ejected


def test_revisions_no_longer_routed_to_are_forgotten() -> None:
    table = HealthTable()
    table.note("old", "dead")
    table.note("new", "dead")
    table.keep_only(["new"])
    assert table.all_ejected() == ("new",)
