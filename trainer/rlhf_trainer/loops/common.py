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

import logging
import math
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_trainer.checkpoint import Component, attempt_folder
from rlhf_trainer.checkpoint_store import CheckpointStore
from rlhf_trainer.components import JsonState, RandomState
from rlhf_trainer.config import GuardrailAction
from rlhf_trainer.distributed import World
from rlhf_trainer.exits import Diverged, GuardrailPaused, GuardrailStopped, Invalid, Preempted
from rlhf_trainer.guardrails import Guardrails
from rlhf_trainer.history import History
from rlhf_trainer.loops.observers import Observation, Observer, first
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard
from rlhf_trainer.tracking.background import Background
from rlhf_trainer.tracking.factory import close as close_tracker
from rlhf_trainer.tracking.factory import open_tracker
from rlhf_trainer.waiting import on_main
from rlhf_trainer.wire import (
    Artifact,
    AttemptConfig,
    CheckpointRecord,
    GuardrailReport,
    ReportPhase,
    Result,
    SkippedCheckpoint,
    Verdict,
)

log = logging.getLogger(__name__)

_COMPONENT_NAME = re.compile(r"[a-z][A-Za-z0-9]*")  # also a folder of the checkpoint, and how a refusal names it


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
    _tracker: Background | None = None
    _total: int = 0
    _begun: bool = False
    _step_began: float = 0.0
    _observing: bool = False

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

        ``components`` is all state that steps change, each thing under one camelCase name of its own; position,
        guardrail counts and random state are added here. Called once. A misuse is a ValueError or RuntimeError: of
        the loop, not of the user.
        """
        if self._components:
            raise RuntimeError("begin() was called before; one session is one run of steps")
        own: dict[str, Component] = {
            "dataPosition": JsonState(self.world, self._position, self._take_position),
            "guardrails": JsonState(self.world, self._guardrails.state, self._guardrails.restore),
            "random": RandomState(self.world),
            **{name: part for observer in self.observers for name, part in observer.components().items()},
        }
        _check_components(components, own)
        self._total = total_steps
        self._components = {**components, **own}
        found, self.skipped = self._store.find(self._components, self.pulse)
        if found is not None:
            self._store.load(found, self._components, self.pulse)
            self.last_checkpoint = found.record
            self.resumed_from = found.taken_by(self.world.size)
            if self.resumed_from.converted_from is not None and self.world.is_main:
                log.info(
                    "the checkpoint of step %d was written by %d ranks and is converted for %d",
                    self.done, self.resumed_from.converted_from, self.world.size,
                )  # fmt: skip
        self.board.resumed(self.done, total_steps, self.resumed_from, self.skipped)
        if self.world.is_main:
            self._tracker = open_tracker(self.config, self.folder)
        self._begun, self._step_began = True, time.monotonic()
        self.ranks.beat()
        return self.done

    def finish_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Ends step number ``done`` (the first is 1). ``metrics`` must be equal on all ranks (``world.means``).

        Saves when due. Raises Diverged, GuardrailPaused, GuardrailStopped, or Preempted after saving.
        """
        if not self._components or done != self.done + 1:
            raise RuntimeError(f"finish_step({done}) after step {self.done}: begin() first, then every step in turn")
        _require_finite(done, metrics)
        self.done = done
        seconds = time.monotonic() - self._step_began
        judgement = self._guardrails.judge(done, metrics)
        seen = self._observe(done)
        figures = {**metrics, "stepSeconds": seconds}
        figures |= {name: value for one in seen for name, value in one.figures.items()}
        self.board.step(done, figures, (*judgement.reports, *(report for one in seen for report in one.reports)))
        if self.world.is_main:
            self._history.append(done, figures)
        if self._tracker is not None:
            self._tracker.metrics(done, figures)
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
        """Runs ``check`` on rank 0 while the others wait and show life; what it raises is raised on every rank."""
        on_main(self.world, check, self.pulse)
        self.pulse()

    def begin_evaluation(self) -> None:
        self.board.phase(ReportPhase.EVALUATING)
        self.pulse()

    def begin_saving(self) -> None:
        self.board.phase(ReportPhase.SAVING)
        self.ranks.beat()

    def pulse(self) -> None:
        """Between steps (loading, evaluating): shows life and gives way to SIGTERM. While observers look at a step it
        only shows life: the step is saved first."""
        self.ranks.beat()
        if not self._observing and self.world.any(self.stop.received):
            if not self._begun:  # an earlier attempt's steps are not known yet
                raise Preempted("SIGTERM before training began; nothing was lost")
            raise Preempted(f"SIGTERM outside a training step; {self.done} of {self._total} steps are done and saved")

    def close(self, result: Result) -> None:
        """Tells the tracker how the attempt ended; nothing that goes wrong with it matters any more."""
        close_tracker(self._tracker, result)

    def _observe(self, done: int) -> tuple[Observation, ...]:
        self._observing = True
        try:
            return tuple(observer.observe(done, self._total) for observer in self.observers)
        finally:
            self._observing = False

    def _save(self) -> None:
        self.last_checkpoint = self._store.save(self.done, self._components, self.ranks.beat)
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


def _check_components(given: Mapping[str, Component], reserved: Mapping[str, Component]) -> None:
    """Raises ValueError for names or objects that would lose state silently."""
    seen: dict[int, str] = {}
    for name, component in given.items():
        if name in reserved:
            raise ValueError(f"component '{name}' is kept by the session itself; choose another name")
        if not _COMPONENT_NAME.fullmatch(name):
            raise ValueError(f"component name {name!r} is not camelCase letters and digits")
        if not isinstance(component, Component):
            raise ValueError(f"component '{name}' is a {type(component).__name__} without save() and load()")
        if id(component) in seen:
            raise ValueError(f"components '{seen[id(component)]}' and '{name}' are the same object; keep one")
        seen[id(component)] = name


def _require_finite(step: int, metrics: Mapping[str, float]) -> None:
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if broken:
        raise Diverged(f"step {step}: {', '.join(broken)} not finite; lower learningRate or inspect the reward model")


def _breach(report: GuardrailReport, step: int) -> str:
    return f"step {step}: guardrail breached since step {report.since_step}: {report.message}"
