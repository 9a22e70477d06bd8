"""Watching for over-optimisation while a policy trains, and keeping the weights the audit liked best.

A look happens between the update and the checkpoint of its step, so a checkpoint always holds the looks up to its own
step and the best weights so far: a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_trainer.checkpoint import Component
from rlhf_trainer.components import JsonState
from rlhf_trainer.config import OverOptimization
from rlhf_trainer.distributed import World
from rlhf_trainer.evals.over_optimization import METRIC, Detector, Finding, Look, standardised, verdict
from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import Generator
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.held_out import HeldOutReplies, as_optimised
from rlhf_trainer.loops.observers import Observation
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.randomness import Stream
from rlhf_trainer.wire import GuardrailReport, Verdict

Weights = dict[str, Tensor]


class Watched(Protocol):
    """What is needed of a trainer; see ``loops.policy.PolicyTrainer``."""

    reference: Any

    def sampling_lm(self) -> AbstractContextManager[Any]: ...

    def generator(self, lm: Any) -> Generator: ...


class Oversight:
    """An observer of the session. ``weights`` yields the policy's whole weights on rank 0, nothing elsewhere."""

    def __init__(
        self,
        session: Session,
        inputs: PolicyInputs,
        trainer: Watched,
        wanted: OverOptimization,
        weights: Callable[[], Weights],
    ) -> None:
        audit = session.config.audit_reward_model
        if audit is None:
            raise Invalid("spec.evaluation.overOptimization needs spec.auditRewardModel: another judge than the reward")
        self._session, self._inputs, self._trainer, self._wanted = session, inputs, trainer, wanted
        self._weights = weights
        device, encoder = session.world.device, inputs.encoder
        proxy = load_reward_model(inputs.reward_model.path, device, encoder)
        self._scorers = (
            as_optimised(proxy, inputs.training.reward_std_penalty),
            as_optimised(load_reward_model(audit.path, device, encoder), 0.0),
        )
        self._replies = HeldOutReplies(session, inputs, Stream.OVERSIGHT)
        # Each once: the rules compare looks prompt by prompt and take prompts for independent.
        self._prompts = self._replies.prompts(min(wanted.samples, len(inputs.holdout_prompts)))
        self._detector = Detector(wanted)
        self._base: list[list[float]] | None = None  # proxy and audit rewards of the base's replies
        self._last: Look | None = None
        self._seen = Observation()
        self._since = 0  # step of the first look of the present breach
        self._best = RankZeroTensors(session.world)

    def components(self) -> Mapping[str, Component]:
        state = JsonState(self._session.world, self._state, self._restore)
        return {"oversight": state} | ({"bestWeights": self._best} if self._wanted.select_best else {})

    def observe(self, done: int, total: int) -> Observation:
        """A look every ``everySteps`` steps and after the last one; between looks the last reports stand."""
        if done % self._wanted.every_steps and done != total:
            return Observation(reports=self._seen.reports)
        look = self._look(done)
        before = self._detector.best
        finding = self._detector.take(look)
        self._last = look
        if self._wanted.select_best and self._detector.best is not before:
            self._best.tensors = self._weights()
        self._seen = self._report(finding)
        return self._seen

    def acknowledge(self) -> None:
        self._detector.reset()

    @property
    def best_step(self) -> int | None:
        """The step whose weights are to be published; None: the present ones."""
        best = self._detector.best
        if not self._wanted.select_best or best is None or best is self._last or best == self._last:
            return None
        return best.step

    @property
    def best_weights(self) -> Weights:
        """Of ``best_step``, on rank 0; nothing elsewhere."""
        return self._best.tensors

    def verdict(self) -> Verdict:
        """On the weights that are published."""
        return verdict(self._detector.best if self._wanted.select_best else self._last, self._wanted)

    def _look(self, done: int) -> Look:
        if self._base is None:
            encoder = self._inputs.encoder
            base = CachedGenerator(self._trainer.reference, pad_id=encoder.pad_id, eos_id=encoder.eos_id)
            self._base = self._replies.score(base, self._prompts, self._scorers)
        with self._trainer.sampling_lm() as lm:
            now = self._replies.score(self._trainer.generator(lm), self._prompts, self._scorers)
        proxy, audit = (standardised(own, base) for own, base in zip(now, self._base, strict=True))
        return Look(done, proxy, audit)

    def _report(self, finding: Finding) -> Observation:
        look, gap = finding.look, finding.look.gap
        breached = finding.breach is not None
        self._since = (self._since or look.step) if breached else 0
        report = GuardrailReport(
            metric=METRIC,
            state="Breached" if breached else "Healthy",
            value=gap.estimate,
            since_step=self._since or look.step,
            action=self._wanted.action.value,
            message=finding.breach
            or f"proxy {look.mean_proxy:+.2f}, audit {look.mean_audit:+.2f} standard deviations of the base; "
            f"{finding.streak} of {self._wanted.patience} looks in a row with proxy up and audit down",
        )
        figures = {"proxyShift": look.mean_proxy, "auditShift": look.mean_audit, "auditGap": gap.estimate}
        return Observation(figures, (report,), report if breached else None)

    def _state(self) -> Mapping[str, Any]:
        last = None if self._last is None else [self._last.step, self._last.proxy, self._last.audit]
        return {
            "detector": self._detector.state(),
            "base": self._base,
            "last": last,
            "since": self._since,
            "reports": [report.model_dump(mode="json") for report in self._seen.reports],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._detector.restore(state["detector"])
        self._base, self._since = state["base"], int(state["since"])
        last = state["last"]
        self._last = None if last is None else Look(int(last[0]), tuple(last[1]), tuple(last[2]))
        self._seen = Observation(reports=tuple(GuardrailReport.model_validate(row) for row in state["reports"]))


class RankZeroTensors:
    """Named tensors that rank 0 alone holds: a whole model is kept once, not on every rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.tensors: Weights = {}

    def save(self, folder: Path) -> None:
        if self._world.is_main and self.tensors:
            save_file(
                {name: value.contiguous() for name, value in self.tensors.items()}, folder / "weights.safetensors"
            )

    def load(self, folder: Path) -> None:
        path = folder / "weights.safetensors"
        self.tensors = load_file(path) if self._world.is_main and path.is_file() else {}
