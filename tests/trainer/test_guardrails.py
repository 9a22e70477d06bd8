"""Guardrails act after consecutive steps, the board shows it, and a figure nobody defined is refused."""

from __future__ import annotations

import os
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rlhf_trainer.checkpoint import Component
from rlhf_trainer.components import JsonState
from rlhf_trainer.config import Checkpoints, GuardrailAction, GuardrailMetric, TrainingGuardrail
from rlhf_trainer.distributed import World
from rlhf_trainer.exits import Diverged, GuardrailPaused, GuardrailStopped, Preempted
from rlhf_trainer.guardrails import Guardrails
from rlhf_trainer.loops.common import Session, StopSignal
from rlhf_trainer.loops.observers import Observation
from rlhf_trainer.metrics import CATALOGUE, reference
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import BoardCollector, StatusBoard, StatusServer
from rlhf_trainer.wire import GuardrailReport, ReportPhase, StatusReport
from tests.trainer.test_checkpoint import Empty, world  # noqa: F401 - the fixture
from tests.trainer.training_world import TinyWorld

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def rail(action: GuardrailAction = GuardrailAction.PAUSE, steps: int = 3) -> TrainingGuardrail:
    return TrainingGuardrail(metric="kl", above=10.0, for_steps=steps, action=action)  # type: ignore[arg-type]


def states(rails: Guardrails, values: list[float]) -> list[str]:
    return [rails.judge(step, {"kl": value}).reports[0].state for step, value in enumerate(values)]


def test_only_consecutive_steps_breach() -> None:
    assert states(Guardrails([rail()]), [11, 12, 9, 11, 12, 13, 14, 9]) == ["Healthy"] * 5 + ["Breached"] * 2 + [
        "Healthy"
    ]


def test_both_directions_and_absent_metrics() -> None:
    rails = Guardrails([TrainingGuardrail(metric="reward", above=5, below=-5, for_steps=1)])  # type: ignore[arg-type]
    assert rails.judge(1, {"reward": -6}).reports[0].state == "Breached"
    assert rails.judge(2, {"reward": 0}).reports[0].state == "Healthy"
    assert rails.judge(3, {"kl": 1}).reports == ()


def test_counts_survive_a_restart_but_not_an_edit() -> None:
    before, after, edited = Guardrails([rail()]), Guardrails([rail()]), Guardrails([rail(steps=2)])
    states(before, [11, 11])
    after.restore(before.state())
    edited.restore(before.state())
    judgement = after.judge(3, {"kl": 11})
    assert judgement.first(GuardrailAction.PAUSE) is not None
    assert judgement.first(GuardrailAction.STOP) is None
    assert edited.judge(3, {"kl": 11}).breached == ()


@pytest.mark.parametrize("metric", list(GuardrailMetric))
@pytest.mark.parametrize("action", list(GuardrailAction))
def test_every_metric_can_ask_for_every_action(metric: GuardrailMetric, action: GuardrailAction) -> None:
    rails = Guardrails([TrainingGuardrail(metric=metric, below=1e-6, for_steps=2, action=action)])  # type: ignore[call-arg]
    assert rails.judge(1, {metric.value: 0.0}).first(action) is None, "one step is noise"
    report = rails.judge(2, {metric.value: 0.0}).first(action)
    assert report is not None
    assert (report.metric, report.since_step) == (metric.value, 1)
    assert rails.judge(3, {metric.value: 0.1}).first(action) is None


@pytest.fixture
def session(tiny_world: TinyWorld, tmp_path: Path, world: World, request: pytest.FixtureRequest) -> Session:  # noqa: F811
    config = tiny_world.config(tmp_path, guardrails=tuple(getattr(request, "param", ())))
    board = StatusBoard(1, "u", 1, lambda: NOW)
    return Session(config, world, board, RankFiles(tmp_path, 0), StopSignal(), lambda: NOW)


@pytest.mark.parametrize(
    ("session", "ending"),
    [
        ([rail(GuardrailAction.PAUSE, 2)], GuardrailPaused),
        ([rail(GuardrailAction.STOP, 2)], GuardrailStopped),
        ([rail(GuardrailAction.PAUSE, 2), rail(GuardrailAction.STOP, 2)], GuardrailStopped),
    ],
    indirect=["session"],
)
def test_a_breach_saves_and_ends(session: Session, ending: type[Exception]) -> None:
    session.begin({}, 100)
    session.finish_step(1, {"kl": 11.0})
    with pytest.raises(ending, match="step 2: guardrail breached since step 1: kl is 11"):
        session.finish_step(2, {"kl": 11.0})
    assert session.last_checkpoint is not None
    assert session.last_checkpoint.step == 2


@pytest.mark.parametrize("session", [[rail(GuardrailAction.PAUSE, 2)]], indirect=True)
def test_an_acknowledged_pause_counts_anew(session: Session) -> None:
    session.begin({}, 100)
    session.finish_step(1, {"kl": 11.0})
    with pytest.raises(GuardrailPaused):
        session.finish_step(2, {"kl": 11.0})
    resumed = Session(session.config, session.world, session.board, session.ranks, StopSignal(), lambda: NOW)
    assert resumed.begin({}, 100) == 2
    resumed.finish_step(3, {"kl": 11.0})
    with pytest.raises(GuardrailPaused):
        resumed.finish_step(4, {"kl": 11.0})


@pytest.mark.parametrize("session", [[rail(GuardrailAction.ALERT, 1)]], indirect=True)
def test_an_alert_only_reports(session: Session) -> None:
    session.begin({}, 100)
    session.finish_step(1, {"kl": 11.0})
    assert session.board.report.guardrails[0].state == "Breached"


def test_a_stop_wish_saves_at_the_step_and_a_bad_figure_does_not(session: Session) -> None:
    session.begin({}, 100)
    session.stop.received = True
    with pytest.raises(Preempted, match="after step 1"):
        session.finish_step(1, {"loss": 0.5})
    assert session.last_checkpoint is not None
    with pytest.raises(Diverged, match="step 2: loss not finite"):
        session.finish_step(2, {"loss": float("nan")})
    assert session.last_checkpoint.step == 1


class Look:
    """An observer that shows life while it looks, as one that samples replies does."""

    def __init__(self, session: Session) -> None:
        self.session, self.seen = session, 0

    def components(self) -> dict[str, Component]:
        return {"look": JsonState(self.session.world, lambda: {"seen": self.seen}, self.restore)}

    def restore(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def observe(self, done: int, total: int) -> Observation:
        assert done < total
        self.session.pulse()
        self.seen = done
        return Observation()

    def acknowledge(self) -> None:
        raise AssertionError("nothing breached")


def test_a_stop_wish_before_or_in_a_look_saves_the_step_and_the_look(session: Session) -> None:
    session.observers.append(Look(session))
    session.begin({}, 100)
    session.stop.received = True
    with pytest.raises(Preempted, match="after step 1; the checkpoint of this step is published"):
        session.finish_step(1, {"loss": 0.5})
    resumed = Session(session.config, session.world, session.board, session.ranks, StopSignal(), lambda: NOW)
    look = Look(resumed)
    resumed.observers.append(look)
    assert (resumed.begin({}, 100), look.seen) == (1, 1)
    resumed.stop.received = True
    with pytest.raises(Preempted, match="outside a training step; 1 of 100 steps are done and saved"):
        resumed.pulse()


def test_a_stop_wish_while_inputs_are_checked_does_not_deny_what_is_saved(session: Session) -> None:
    session.begin({}, 100)
    session.stop.received = True
    with pytest.raises(Preempted):
        session.finish_step(1, {"loss": 0.5})
    resumed = Session(session.config, session.world, session.board, session.ranks, StopSignal(), lambda: NOW)
    resumed.stop.received = True
    with pytest.raises(Preempted, match="SIGTERM before training began; nothing was lost"):
        resumed.pulse()


def test_life_is_shown_while_older_checkpoints_are_verified(session: Session) -> None:
    """Hashing all that is kept takes longer than the watchdog allows: here until a beat came after it had begun."""
    config = session.config.model_copy(update={"checkpoints": Checkpoints(every_steps=1, keep_last=2)})
    session = Session(config, session.world, session.board, session.ranks, StopSignal(), lambda: NOW)
    session.begin({"empty": Empty()}, 100)
    session.finish_step(1, {"loss": 0.5})
    assert session.last_checkpoint is not None
    slow, beat = Path(session.last_checkpoint.path) / "empty" / "nothing", session.ranks.folder / "rank-0.beat"
    slow.unlink()
    os.mkfifo(slow)
    beats = []

    def feed() -> None:
        with slow.open("wb"):  # opens when the hashing does
            os.utime(beat, (0, 0))
            deadline = time.monotonic() + 5
            while beat.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            beats.append(beat.stat().st_mtime)

    feeder = threading.Thread(target=feed)
    feeder.start()
    session.finish_step(2, {"loss": 0.5})
    feeder.join()
    assert beats[0] > 0, "a rank that verifies looked like one that hangs"


def test_a_metric_outside_the_catalogue_is_refused() -> None:
    board = StatusBoard(1, "u", 1, lambda: NOW)
    with pytest.raises(KeyError, match="sparkle"):
        board.step(1, {"sparkle": 1.0}, ())


def test_the_catalogue_reads_as_a_table() -> None:
    table = reference()
    assert "| `clippedFraction` | `rlhf_trainer_clipped_fraction` | fraction |" in table
    assert len({metric.prometheus_name for metric in CATALOGUE.values()}) == len(CATALOGUE)


def test_endpoints_show_the_board() -> None:
    board = StatusBoard(4, "uid-1", 2, lambda: NOW)
    board.resumed(5, 50, None, ())
    breached = GuardrailReport(metric="kl", state="Breached", value=12.0, since_step=5, action="Pause")
    board.step(6, {"kl": 12.0, "responseLength": 9.5}, [breached])
    with StatusServer(board, 0, "127.0.0.1") as server:
        base = f"http://127.0.0.1:{server.port}"
        status = StatusReport.model_validate_json(urllib.request.urlopen(base + "/status").read())
        text = urllib.request.urlopen(base + "/metrics").read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(base + "/elsewhere")
        with StatusServer(board, server.port or 0, "127.0.0.1") as second:
            assert second.port is None, "a taken port is survived"
    assert (status.attempt, status.uid, status.step, status.total_steps) == (4, "uid-1", 6, 50)
    assert (status.phase, status.metrics["kl"], status.last_step_at) == (ReportPhase.TRAINING, 12.0, NOW)
    for line in (
        "rlhf_trainer_step 6.0",
        "rlhf_trainer_kl 12.0",
        "rlhf_trainer_response_length 9.5",
        'rlhf_trainer_phase{phase="Training"} 1.0',
        'rlhf_trainer_guardrail_breached{action="Pause",metric="kl"} 1.0',
        "rlhf_trainer_last_step_timestamp_seconds 1.7672256e+09",
    ):
        assert line in text.splitlines()


def test_two_limits_on_one_metric_are_one_series_that_shows_the_breach() -> None:
    """Prometheus keeps one sample of a series: the other is an error of the scrape, be it the breach."""
    rails = Guardrails(
        [TrainingGuardrail(metric="kl", above=limit, for_steps=1) for limit in (10.0, 20.0, 30.0)]  # type: ignore[call-arg, arg-type]
    )
    board = StatusBoard(1, "u", 1, lambda: NOW)
    board.step(1, {"kl": 15.0}, rails.judge(1, {"kl": 15.0}).reports)
    (family,) = (each for each in BoardCollector(board).collect() if each.name == "rlhf_trainer_guardrail_breached")
    assert [(each.labels, each.value) for each in family.samples] == [({"metric": "kl", "action": "Alert"}, 1.0)]
