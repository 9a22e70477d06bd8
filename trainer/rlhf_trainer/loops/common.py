"""What every training loop shares: resume, the end of a step, checkpoints, guardrails and being told to stop.

    components = {"engine": engine, "klController": JsonState(...)}
    for step in range(session.begin(components, total_steps), total_steps):
        ... train ...
        session.finish_step(step + 1, world.means(metrics))
    session.begin_evaluation()
    for batch in ...:
        session.pulse()

Every method is collective: all ranks call it at the same point with the same values.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_trainer.checkpoint import CheckpointStore, Component, attempt_folder
from rlhf_trainer.components import JsonState, RandomState
from rlhf_trainer.config import GuardrailAction
from rlhf_trainer.distributed import World
from rlhf_trainer.exits import Diverged, GuardrailPaused, GuardrailStopped, Invalid, Preempted
from rlhf_trainer.guardrails import Guardrails
from rlhf_trainer.history import History
from rlhf_trainer.loops.observers import Observer, first
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.wire import (
    Artifact,
    AttemptConfig,
    CheckpointRecord,
    GuardrailReport,
    ReportPhase,
    SkippedCheckpoint,
    Verdict,
)


class StopSignal:
    """SIGTERM as a flag: a step is finished and saved before the process ends."""

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, _number: int, _frame: object) -> None:
        self.received = True


@dataclass(frozen=True)
class Outcome:
    """What a loop that ran to its end hands to the worker. The gate is passed iff every verdict is Pass."""

    artifact: Artifact
    verdicts: tuple[Verdict, ...]
    metrics: Mapping[str, float]
    lineage: Mapping[str, str]
    gate_reason: str  # of the failure, when a verdict is not Pass


@dataclass
class Session:
    """One attempt as its loop sees it."""

    config: AttemptConfig
    world: World
    board: StatusBoard
    ranks: RankFiles
    stop: StopSignal
    clock: Callable[[], datetime]
    done: int = 0  # steps
    last_checkpoint: CheckpointRecord | None = None
    resumed_from: CheckpointRecord | None = None
    skipped: tuple[SkippedCheckpoint, ...] = ()
    observers: list[Observer] = field(default_factory=list)  # added before ``begin``
    _components: dict[str, Component] = field(default_factory=dict)
    _total: int = 0
    _step_began: float = 0.0

    def __post_init__(self) -> None:
        self._guardrails = Guardrails(self.config.guardrails)
        self._history = History(self.folder)
        self._store = CheckpointStore(
            Path(self.config.output.path),
            self.config.attempt,
            self.config.config_digest,
            self.config.checkpoints.keep_last,
            self.world,
            self.clock,
        )

    @property
    def folder(self) -> Path:
        """This attempt's folder; the artifact goes to ``folder / "artifact"``."""
        return attempt_folder(Path(self.config.output.path), self.config.attempt)

    def begin(self, components: Mapping[str, Component], total_steps: int) -> int:
        """Loads the newest verified checkpoint, if any, into ``components``; returns the number of steps done.

        ``components`` is all state that steps change; position, guardrail counts and random state are added here.
        """
        self._total = total_steps
        self._components = {
            **components,
            "dataPosition": JsonState(self.world, self._position, self._take_position),
            "guardrails": JsonState(self.world, self._guardrails.state, self._guardrails.restore),
            "random": RandomState(self.world),
            **{name: part for observer in self.observers for name, part in observer.components().items()},
        }
        found, self.skipped = self._store.find(self._components)
        if found is not None:
            self._store.load(found, self._components)
            self.resumed_from = self.last_checkpoint = found.record
        self.board.resumed(self.done, total_steps, self.resumed_from, self.skipped)
        self._step_began = time.monotonic()
        self.ranks.beat()
        return self.done

    def finish_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Ends step number ``done`` (the first is 1). ``metrics`` must be equal on all ranks (``world.means``).

        Saves when due. Raises Diverged, GuardrailPaused, GuardrailStopped, or Preempted after saving.
        """
        _require_finite(done, metrics)
        self.done = done
        seconds = time.monotonic() - self._step_began
        judgement = self._guardrails.judge(done, metrics)
        seen = tuple(observer.observe(done, self._total) for observer in self.observers)
        figures = {**metrics, "stepSeconds": seconds}
        figures |= {name: value for one in seen for name, value in one.figures.items()}
        self.board.step(done, figures, (*judgement.reports, *(report for one in seen for report in one.reports)))
        if self.world.is_main:
            self._history.append(done, figures)
        self.ranks.beat()
        pause, halt = (
            judgement.first(action) or first(seen, action) for action in (GuardrailAction.PAUSE, GuardrailAction.STOP)
        )
        stopping = self.world.any(self.stop.received)
        if pause is not None or halt is not None:
            self._guardrails.reset()
            for observer in self.observers:
                observer.acknowledge()
        due = done % self.config.checkpoints.every_steps == 0 or done == self._total
        if due or stopping or pause is not None or halt is not None:
            self._save()
        if halt is not None:
            raise GuardrailStopped(_breach(halt, done))
        if pause is not None:
            raise GuardrailPaused(_breach(pause, done) + "; acknowledge it with a Decision to go on")
        if stopping:
            raise Preempted(f"SIGTERM after step {done}; the checkpoint of this step is published")
        self._step_began = time.monotonic()

    def first_on_main(self, check: Callable[[], None]) -> None:
        """Runs ``check`` on rank 0 while the others wait; what it raises as Invalid is raised on every rank."""
        message: tuple[str, str] | None = None
        if self.world.is_main:
            try:
                check()
            except Invalid as invalid:
                message = (invalid.message, invalid.reason)
        message = self.world.broadcast(message)
        if message is not None:
            raise Invalid(*message)
        self.pulse()

    def begin_evaluation(self) -> None:
        self.board.phase(ReportPhase.EVALUATING)
        self.pulse()

    def begin_saving(self) -> None:
        self.board.phase(ReportPhase.SAVING)
        self.ranks.beat()

    def pulse(self) -> None:
        """Between steps (loading, evaluating): shows life and gives way to SIGTERM."""
        self.ranks.beat()
        if self.world.any(self.stop.received):
            raise Preempted(f"SIGTERM outside a training step; {self.done} of {self._total} steps are done and saved")

    def _save(self) -> None:
        self.last_checkpoint = self._store.save(self.done, self._components)
        self.board.checkpoint(self.last_checkpoint)
        self.ranks.beat()

    def _position(self) -> dict[str, Any]:
        return {"step": self.done, "totalSteps": self._total}

    def _take_position(self, state: dict[str, Any]) -> None:
        if state["totalSteps"] != self._total:
            raise Invalid(
                f"the checkpoint is of a run of {state['totalSteps']} steps, this one has {self._total}; "
                "the training or its data changed, so start a new run",
                reason="DigestMismatch",
            )
        self.done = int(state["step"])


def _require_finite(step: int, metrics: Mapping[str, float]) -> None:
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if broken:
        raise Diverged(f"step {step}: {', '.join(broken)} not finite; lower learningRate or inspect the reward model")


def _breach(report: GuardrailReport, step: int) -> str:
    return f"step {step}: guardrail breached since step {report.since_step}: {report.message}"
