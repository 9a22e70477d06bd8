"""Conditions: the transition time moves when the status flips, and only then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from rlhf_operator.api import conditions as c
from rlhf_operator.api.meta import ConditionStatus

T0 = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
T1 = T0 + timedelta(minutes=1)


def accepted(before: list[ConditionStatus], status: bool | None, at: datetime, reason: str = "R") -> ConditionStatus:
    found = c.find(
        c.set_condition(before, c.JobCondition.ACCEPTED, status, reason, "why", generation=4, now=at), "Accepted"
    )
    assert found is not None
    return found


def test_a_new_condition_carries_time_generation_and_reason() -> None:
    found = accepted([], True, T0)

    assert found.to_dict() == {
        "type": "Accepted",
        "status": "True",
        "reason": "R",
        "message": "why",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
        "observedGeneration": 4,
    }


def test_the_time_moves_only_when_the_status_flips() -> None:
    first = [accepted([], True, T0)]

    same = accepted(first, True, T1, reason="Other")
    flipped = accepted(first, False, T1)
    unknown = accepted(first, None, T1)

    assert (same.last_transition_time, same.reason) == ("2026-01-02T03:04:05Z", "Other")
    assert flipped.last_transition_time == unknown.last_transition_time == "2026-01-02T03:05:05Z"
    assert unknown.status == "Unknown"


def test_the_other_conditions_and_the_order_stay() -> None:
    before = c.set_condition([], "A", True, "R", "", generation=1, now=T0)
    before = c.set_condition(before, "B", True, "R", "", generation=1, now=T0)

    after = c.set_condition(before, "A", False, "R", "", generation=2, now=T1)

    assert [condition.type for condition in after] == ["A", "B"]
    assert after[1] == before[1]
    assert c.remove_condition(after, "A") == [before[1]]


def test_absent_is_not_true_and_the_first_true_wins() -> None:
    conditions = c.set_condition([], "B", True, "R", "", generation=1, now=T0)

    assert not c.is_true(conditions, "A")
    assert c.first_true(conditions, ("A", "B")) == "B"
    assert c.first_true(conditions, ("A",)) is None


def test_a_message_too_long_for_the_api_is_cut() -> None:
    (found,) = c.set_condition([], "A", True, "R", "x" * 40_000, generation=1, now=T0)

    assert len(found.message) == 32768
    assert found.message.endswith("x…")


def test_times_are_utc_in_whole_seconds() -> None:
    local = datetime(2026, 1, 2, 5, 4, 5, 999, tzinfo=timezone(timedelta(hours=2)))

    assert c.rfc3339(local) == "2026-01-02T03:04:05Z"
