"""Training guardrails: judged at every step, with hysteresis, so nothing between two polls is missed. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.config import GuardrailAction, TrainingGuardrail
from rlhf_trainer.wire import GuardrailReport


@dataclass(frozen=True)
class Judgement:
    """What all guardrails say after one step; ``breached`` are those that act now, in the order configured."""

    reports: tuple[GuardrailReport, ...]
    breached: tuple[TrainingGuardrail, ...]

    def first(self, action: GuardrailAction) -> GuardrailReport | None:
        """The report of the first guardrail that demands ``action``."""
        demanding = {rail.metric.value for rail in self.breached if rail.action is action}
        reports = (report for report in self.reports if report.state == "Breached" and report.action == action.value)
        return next((report for report in reports if report.metric in demanding), None)


class Guardrails:
    """Counts consecutive steps beyond each limit. A step inside it starts the count again."""

    def __init__(self, rails: Sequence[TrainingGuardrail]) -> None:
        self._rails = tuple(rails)
        self._counts = [0] * len(self._rails)
        self._since = [0] * len(self._rails)

    def judge(self, step: int, metrics: Mapping[str, float]) -> Judgement:
        """Takes one step's metrics into account; a metric that the step did not report leaves its count unchanged."""
        reports, breached = [], []
        for index, rail in enumerate(self._rails):
            value = metrics.get(rail.metric.value)
            if value is None:
                continue
            beyond = _beyond(rail, value)
            if beyond and self._counts[index] == 0:
                self._since[index] = step
            self._counts[index] = self._counts[index] + 1 if beyond else 0
            acts = self._counts[index] >= rail.for_steps
            if acts:
                breached.append(rail)
            reports.append(_report(rail, value, acts, self._since[index] if beyond else step, self._counts[index]))
        return Judgement(tuple(reports), tuple(breached))

    def reset(self) -> None:
        """Forgets all counts: after a pause, an acknowledged breach must last ``forSteps`` steps anew to act again."""
        self._counts = [0] * len(self._rails)

    def state(self) -> dict[str, Any]:
        entries = zip(self._rails, self._counts, self._since, strict=True)
        return {_identity(rail): {"count": count, "since": since} for rail, count, since in entries}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up the saved counts of guardrails that are still the same; an edited one (which a suspended job
        allows) counts from its start."""
        for index, rail in enumerate(self._rails):
            saved = state.get(_identity(rail))
            if saved is not None:
                self._counts[index], self._since[index] = int(saved["count"]), int(saved["since"])


def _identity(rail: TrainingGuardrail) -> str:
    return json.dumps(rail.model_dump(mode="json"), sort_keys=True)


def _beyond(rail: TrainingGuardrail, value: float) -> bool:
    return (rail.above is not None and value > rail.above) or (rail.below is not None and value < rail.below)


def _report(rail: TrainingGuardrail, value: float, acts: bool, since: int, count: int) -> GuardrailReport:
    bounds = (("above", rail.above), ("below", rail.below))
    limits = [f"{side} {bound:g}" for side, bound in bounds if bound is not None]
    message = f"{rail.metric.value} is {value:.4g}; {rail.action.value} when {' or '.join(limits)} for {rail.for_steps}"
    return GuardrailReport(
        metric=rail.metric.value,
        state="Breached" if acts else "Healthy",
        value=value,
        since_step=since,
        action=rail.action.value,
        message=f"{message} steps, {count} so far",
    )
