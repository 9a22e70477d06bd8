"""Who looks at a run between its steps: after the update and before the checkpoint, so that what it saw is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_trainer.checkpoint import Component
from rlhf_trainer.config import GuardrailAction
from rlhf_trainer.wire import GuardrailReport


@dataclass(frozen=True)
class Observation:
    """``reports`` are shown; ``acting`` is the one whose action is due now, if any."""

    figures: Mapping[str, float] = field(default_factory=dict)
    reports: tuple[GuardrailReport, ...] = ()
    acting: GuardrailReport | None = None


class Observer(Protocol):
    """Every method is collective."""

    def components(self) -> Mapping[str, Component]:
        """Its state, a part of every checkpoint."""
        ...

    def observe(self, done: int, total: int) -> Observation:
        """After step number ``done`` of ``total``. Equal on all ranks."""
        ...

    def acknowledge(self) -> None:
        """The run pauses: what breached must breach anew before it acts again."""
        ...


def first(seen: tuple[Observation, ...], action: GuardrailAction) -> GuardrailReport | None:
    """The first report that demands ``action`` now."""
    acting = (one.acting for one in seen if one.acting is not None)
    return next((report for report in acting if report.action == action.value), None)
