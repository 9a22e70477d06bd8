"""What the demo draws is what happened."""

from __future__ import annotations

from demo.charts import shares
from demo.story import RolloutPoint


def points(*course: tuple[str, float]) -> list[RolloutPoint]:
    return [RolloutPoint(float(at), phase, 0, weight, "desk-b") for at, (phase, weight) in enumerate(course)]


def test_a_promoted_candidate_ends_with_all_the_traffic() -> None:
    course = points(("Healthy", 0.0), ("Shadowing", 0.0), ("Progressing", 10.0), ("Promoting", 50.0))
    assert shares(course) == [0.0, 0.0, 10.0, 50.0]
    assert shares([*course, *points(("Promoting", 0.0), ("Healthy", 0.0))])[-2:] == [100.0, 100.0]


def test_one_that_is_rolled_back_ends_with_none() -> None:
    assert shares(points(("Progressing", 10.0), ("RollingBack", 0.0), ("RolledBack", 0.0), ("Healthy", 0.0)))[-1] == 0.0
