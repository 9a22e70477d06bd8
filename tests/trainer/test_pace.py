"""When the last step is expected: at the pace of the latest steps, whatever lies between them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from rlhf_trainer.status import Pace, StatusBoard

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ends_of(seconds: list[float], total: int) -> list[datetime | None]:
    """What a run of ``total`` steps expects after each step, if these ended so many seconds after its begin."""
    pace = Pace()
    return [pace.last_step(NOW + timedelta(seconds=at), total - step - 1) for step, at in enumerate(seconds)]


def test_an_even_pace_is_foreseen_exactly_from_the_fourth_step_on() -> None:
    found = ends_of([60 + 2.0 * step for step in range(10)], 10)  # the first, in which all is made, takes longer
    assert found[:3] == [None] * 3
    assert set(found[3:]) == {NOW + timedelta(seconds=60 + 18)}


def test_looks_and_checkpoints_between_steps_count() -> None:
    times, at = [], 0.0
    for step in range(40):
        at += 11.0 if step % 10 == 9 else 1.0
        times.append(at)
    (last,) = {ends_of(times, 80)[-1]}
    assert last is not None
    assert abs((last - NOW).total_seconds() - 160) < 12


def test_an_old_pace_is_forgotten() -> None:
    slow = [10.0 * step for step in range(100)]
    fast = [slow[-1] + 1.0 * (step + 1) for step in range(60)]
    assert ends_of(slow + fast, 200)[-1] == NOW + timedelta(seconds=fast[-1] + 40)


def test_the_board_reports_it_and_ends_with_the_last_step() -> None:
    now = NOW
    board = StatusBoard(1, "u", 1, lambda: now)
    board.resumed(0, 6, None, ())
    expected = []
    for step in range(1, 7):
        now = NOW + timedelta(seconds=step)
        board.step(step, {}, ())
        expected.append(board.report.expected_end_at)
    assert expected == [None, None, None, *[NOW + timedelta(seconds=6)] * 3]
