"""The frame of every policy algorithm: prepare, train, judge against the base, publish.

An algorithm is a ``PolicyTrainer``; which one a run uses is looked up in one table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rlhf_trainer.artifact import publish_artifact
from rlhf_trainer.config import ONLINE, Algorithm, Evaluation, Opponent
from rlhf_trainer.engine import Engine
from rlhf_trainer.generate.base import Generator
from rlhf_trainer.loops.best_of_n_preflight import best_of_n_preflight
from rlhf_trainer.loops.common import Outcome, Session
from rlhf_trainer.loops.oversight import Oversight
from rlhf_trainer.loops.policy_gate import PolicyGate
from rlhf_trainer.loops.policy_inputs import PolicyInputs, lineage, prepare
from rlhf_trainer.loops.suite_gate import judge_suite
from rlhf_trainer.models.adapters import plain_state
from rlhf_trainer.models.policy import load_policy
from rlhf_trainer.models.reward import check_reward_model
from rlhf_trainer.preflight_models import check_context, read_model


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
    session.first_on_main(lambda: _check_reward_models(session, inputs))
    trainer = make_trainer(session, inputs)
    evaluation = session.config.evaluation or Evaluation()
    before = best_of_n_preflight(session, inputs, trainer.reference)
    oversight = _watch(session, inputs, trainer, evaluation)
    trainer.train(lambda _done: None)
    session.begin_evaluation()
    with _published(session, inputs, trainer, oversight) as lm:
        other = opponent(trainer, evaluation)
        sampler = trainer.generator(lm)
        gate = PolicyGate(session, inputs, sampler, trainer.reference, lm, other)
        verdicts, figures = gate.judge(evaluation)
        suite_verdicts, suite_figures = judge_suite(session, inputs, sampler)
        weights = _on_main(session, lm)
    figures |= suite_figures
    verdicts = (*before, *verdicts, *suite_verdicts, *(() if oversight is None else (oversight.verdict(),)))
    session.board.figures(figures)
    session.board.verdicts(verdicts)
    session.begin_saving()
    digests = lineage(session.config)

    def write(folder: Path) -> None:
        # Through a whole model of the same shape, so that tied weights are written once.
        finished = _with_weights(inputs, weights)
        finished.save_pretrained(folder)
        inputs.encoder.tokenizer.save_pretrained(folder)

    artifact = publish_artifact(session, write, digests, verdicts)
    return Outcome(artifact, verdicts, figures, digests, gate_reason="EvaluationGateFailed")


def _check_reward_models(session: Session, inputs: PolicyInputs) -> None:
    """Whatever reward model takes part must be whole, have learnt from text laid out as this policy's, and have room
    for its longest reply."""
    training = inputs.training
    # A reply that the limit cut is scored with an end of sequence all the same.
    longest = training.max_prompt_length + training.generation.max_new_tokens + 1
    fields = "a prompt of training.maxPromptLength, a reply of generation.maxNewTokens and its end"
    models = {"rewardModel": inputs.given_reward_model, "auditRewardModel": session.config.audit_reward_model}
    for name, located in models.items():
        if located is not None:
            check_reward_model(located.path, inputs.encoder)
            member = read_model(name, Path(located.path) / "members" / "0")  # all of one base
            check_context(member, longest, fields)


def policy_weights(session: Session, trainer: PolicyTrainer) -> dict[str, Any]:
    """The policy's whole float32 weights on rank 0, nothing elsewhere. Collective."""
    with trainer.sampling_lm() as lm:
        return _on_main(session, lm)


def _on_main(session: Session, lm: Any) -> dict[str, Any]:
    if not session.world.is_main:
        return {}
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in plain_state(lm).items()}


def _with_weights(inputs: PolicyInputs, weights: Mapping[str, Tensor]) -> Any:
    """A plain model of the base's shape with these weights, on the CPU."""
    lm, _ = load_policy(inputs.policy.path)
    lm.load_state_dict(weights)
    return lm


def _watch(session: Session, inputs: PolicyInputs, trainer: PolicyTrainer, evaluation: Evaluation) -> Oversight | None:
    """The over-optimisation watch that the evaluation asks for, joined to the session."""
    if evaluation.over_optimization is None:
        return None
    watch = Oversight(session, inputs, trainer, evaluation.over_optimization, lambda: policy_weights(session, trainer))
    session.observers.append(watch)
    return watch


@contextmanager
def _published(
    session: Session, inputs: PolicyInputs, trainer: PolicyTrainer, oversight: Oversight | None
) -> Iterator[Any]:
    """The language model that is judged and published: the best look's where one was better than the last."""
    if oversight is None or oversight.best_step is None:
        with trainer.sampling_lm() as lm:
            yield lm
        return
    yield _with_weights(inputs, session.world.broadcast(oversight.best_weights)).to(session.world.device)
