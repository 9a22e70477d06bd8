"""A limit that will end a run before its last step is told while there is time to act."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from tests.unit.jobs_world import World, reward_spec, rfc3339, training

GPU = {"numNodes": 2, "numProcPerNode": 1, "resourcesPerNode": {"limits": {"nvidia.com/gpu": "4"}}}
BUDGET = {"gpuHours": 8.0}  # one hour of 8 GPUs


def expecting(world: World, minutes: float, step: int) -> None:
    """A report, half a minute after the one before, by which the last step ends that much later."""
    world.now += timedelta(seconds=31)
    world.report(step=step, expectedEndAt=rfc3339(world.now + timedelta(minutes=minutes)))


def warnings(world: World) -> list[str]:
    return [event.reason for event in world.events if event.reason.startswith("Will")]


def test_a_budget_that_will_not_last_is_told_once_and_taken_back() -> None:
    world = training(reward_spec(trainer=GPU, budget=BUDGET))
    expecting(world, 30, 2)
    assert world.holds("WithinBudget") == ("True", "AsExpected")
    for step in (3, 4):
        expecting(world, 120, step)
        assert world.holds("WithinBudget") == ("True", "WillExhaustBudget")
    assert world.phase == "Running"
    assert warnings(world) == ["WillExhaustBudget"]
    message = world.condition("WithinBudget")["message"]
    ends, strikes = re.findall(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", message)
    assert ends > strikes
    assert "the budget of 8 GPU hours is used up: suspend the job to raise spec.budget" in message
    expecting(world, 20, 50)
    assert world.holds("WithinBudget") == ("True", "AsExpected")


def test_a_deadline_that_will_be_missed_is_told_and_the_job_runs_on() -> None:
    world = training(reward_spec(activeDeadlineSeconds=600))
    expecting(world, 30, 2)
    assert world.holds("Progressing") == ("True", "WillExceedDeadline")
    assert "activeDeadlineSeconds of 600 s" in world.condition("Progressing")["message"]
    assert world.phase == "Running"
    assert warnings(world) == ["WillExceedDeadline"]


def test_a_pace_is_an_estimate_and_what_is_nearly_in_time_is_not_warned_of() -> None:
    """One hour less a minute is left of the budget; 61 minutes are nearly that, 66 are not."""
    for minutes, reason in ((61.0, "AsExpected"), (66.0, "WillExhaustBudget")):
        world = training(reward_spec(trainer=GPU, budget=BUDGET))
        expecting(world, minutes, 2)
        assert world.holds("WithinBudget") == ("True", reason)


@pytest.mark.parametrize("spec", [{}, {"budget": BUDGET, "trainer": GPU}, {"activeDeadlineSeconds": 600}])
def test_nothing_is_foreseen_without_a_limit_or_without_a_pace(spec: dict[str, object]) -> None:
    world = training(reward_spec(**spec))
    if spec:
        world.now += timedelta(seconds=31)
        world.report(step=2)
    else:
        expecting(world, 10_000, 2)
    assert warnings(world) == []
    assert world.status["progress"].get("expectedEndAt") == (
        None if spec else rfc3339(world.now + timedelta(minutes=10_000))
    )


def test_what_was_foreseen_is_written_with_the_report_and_not_by_the_passing_of_time() -> None:
    world = training(reward_spec(trainer=GPU, budget=BUDGET))
    expecting(world, 120, 2)
    before = world.status
    for _ in range(5):
        world.tick(5)
    assert world.status == before


def test_an_attempt_that_ended_expects_nothing() -> None:
    world = training(reward_spec(trainer=GPU, budget=BUDGET))
    expecting(world, 120, 2)
    world.edit(suspend=True)
    world.tick(60)
    assert world.holds("WithinBudget") == ("True", "AsExpected")
