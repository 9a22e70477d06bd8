"""The frame of every policy algorithm: prepare, train, judge against the base, publish.

An algorithm is a ``PolicyTrainer``; which one a run uses is looked up in one table.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from rlhf_trainer.artifact import publish_artifact
from rlhf_trainer.config import ONLINE, Algorithm, Evaluation, Opponent
from rlhf_trainer.engine import Engine
from rlhf_trainer.generate.base import Generator
from rlhf_trainer.loops.common import Outcome, Session
from rlhf_trainer.loops.policy_gate import PolicyGate
from rlhf_trainer.loops.policy_inputs import PolicyInputs, lineage, prepare


class PolicyTrainer(Protocol):
    """One algorithm on one engine whose module has the policy as ``lm``. Every method is collective."""

    engine: Engine
    reference: Any  # the frozen base policy, whole on every rank

    def train(self, after_step: Callable[[int], None]) -> None:
        """All remaining steps of the run, each ended by ``session.finish_step`` and then ``after_step(done)``."""
        ...

    def sampling_lm(self) -> AbstractContextManager[Any]:
        """The current policy's language model with whole weights."""
        ...

    def generator(self, lm: Any) -> Generator:
        """A sampler of ``lm``."""
        ...


# "module:class", imported when chosen: a run pays for its own algorithm's imports alone.
_TRAINERS = {
    **dict.fromkeys(ONLINE, "rlhf_trainer.loops.online:OnlineTrainer"),
    Algorithm.DPO: "rlhf_trainer.loops.preference:PreferenceTrainer",
    Algorithm.KTO: "rlhf_trainer.loops.kto:KTOTrainer",
    Algorithm.SFT: "rlhf_trainer.loops.supervised:SupervisedTrainer",
    Algorithm.DISTILLATION: "rlhf_trainer.loops.distillation:DistillationTrainer",
}


def make_trainer(session: Session, inputs: PolicyInputs) -> PolicyTrainer:
    module, _, name = _TRAINERS[inputs.training.algorithm].partition(":")
    trainer: PolicyTrainer = getattr(importlib.import_module(module), name)(session, inputs)
    return trainer


class Taught(Protocol):
    """A trainer whose student learns from a teacher."""

    teacher: Any  # frozen, whole on every rank


def opponent(trainer: PolicyTrainer, evaluation: Evaluation) -> Any:
    """Whom the policy is judged against; ``policy_needs`` has refused a teacher where there is none."""
    if evaluation.against is Opponent.TEACHER:
        return cast(Taught, trainer).teacher
    return trainer.reference


def run(session: Session) -> Outcome:
    """The whole attempt, from preflight to artifact. Raises the endings of ``exits``."""
    inputs = prepare(session)
    trainer = make_trainer(session, inputs)
    trainer.train(lambda _done: None)
    session.begin_evaluation()
    evaluation = session.config.evaluation or Evaluation()
    with trainer.sampling_lm() as lm:
        other = opponent(trainer, evaluation)
        gate = PolicyGate(session, inputs, trainer.generator(lm), trainer.reference, lm, other)
        verdicts, figures = gate.judge(evaluation)
    session.board.figures(figures)
    session.board.verdicts(verdicts)
    session.begin_saving()
    weights = trainer.engine.state_dict()
    digests = lineage(session.config)

    def write(folder: Path) -> None:
        own = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
        # Through a whole model of the same shape, so that tied weights are written once.
        finished = copy.deepcopy(trainer.reference).cpu()
        finished.load_state_dict(own)
        finished.save_pretrained(folder)
        inputs.encoder.tokenizer.save_pretrained(folder)

    artifact = publish_artifact(session, write, digests, verdicts)
    return Outcome(artifact, verdicts, figures, digests, gate_reason="EvaluationGateFailed")
