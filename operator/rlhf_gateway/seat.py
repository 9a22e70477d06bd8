"""A request's place in the experiment, and the writing down of what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlhf_gateway.assignment import Conversation, arm_of
from rlhf_gateway.evidence import Outcome, RowKey, Scope
from rlhf_gateway.openai import answers
from rlhf_gateway.records import Record, Recorder
from rlhf_gateway.state import State
from rlhf_gateway.upstream import Answer
from rlhf_gateway.wire import Arm, Backend, GatewayConfig


@dataclass(frozen=True)
class Seat:
    """Fixed when the request arrives: a later configuration does not move it."""

    config: GatewayConfig
    arm: Arm
    backend: Backend
    conversation: Conversation
    shadow: bool = False
    compared: bool = True  # False: the canary is known to be dead, so that the other arm alone would be counted

    @property
    def row(self) -> RowKey:
        return RowKey(self.config.stage, self.arm, self.backend.revision, self.shadow)

    @property
    def scope(self) -> Scope | None:
        if not self.compared:
            return None
        return Scope(self.config.salt, self.config.stage, self.config.canary is not None)

    @property
    def mirrored(self) -> Seat | None:
        """The canary's seat for the same question, in a shadow stage."""
        canary = self.config.canary
        if not self.config.shadow or self.arm == "canary" or canary is None:
            return None
        return replace(self, arm="canary", backend=canary, shadow=True)


def seat_of(config: GatewayConfig, conversation: Conversation) -> Seat | None:
    """Where a conversation belongs; None when the configuration has no revision to answer it."""
    weight = config.canary_weight_percent if config.canary is not None else 0.0
    arm = arm_of(config.salt, conversation.key, weight)
    backend = config.canary if arm == "canary" else config.stable
    return Seat(config, arm, backend, conversation) if backend is not None else None


@dataclass(frozen=True)
class Fate:
    """What the user got for a request: which revision's answer, with which status, and why not their own arm's."""

    served_by: str | None = None
    status: int | None = None
    fallback: str | None = None


class Clerk:
    """Judges answers and writes outcomes to the ledger and the records."""

    def __init__(self, state: State, recorder: Recorder, wall: Callable[[], float] = time.time) -> None:
        self._state = state
        self._recorder = recorder
        self._wall = wall

    async def judge(self, answer: Answer) -> bool | None:
        """Whether a whole answer trips the safety filter; None when it cannot be told."""
        if answer.status >= 300:
            return None
        return await self._state.safety.judge(answers(answer.content_type, answer.body))

    async def judge_part(self, content_type: str, received: bytes) -> bool | None:
        """The same for what a user had already received of an answer that broke off."""
        return await self._state.safety.judge(answers(content_type, received))

    def write(self, seat: Seat, outcome: Outcome, fate: Fate) -> None:
        self._state.ledger.record(seat.scope, seat.row, seat.conversation, outcome)
        record = Record(
            time=self._wall(),
            generation=seat.config.generation,
            stage=seat.config.stage,
            arm=seat.arm,
            revision=seat.backend.revision,
            served_by=fate.served_by,
            status=fate.status,
            fallback=fate.fallback,
            shadow=seat.shadow,
            failed=outcome.failed,
            violating=outcome.violating,
            latency_ms=round(outcome.latency_ms, 3) if outcome.latency_ms is not None else None,
        )
        self._recorder.write(record, seat.conversation)

    def event(self, name: str, seat: Seat) -> None:
        """Count something that is no evidence."""
        arm = "shadow" if seat.shadow else seat.arm
        self._state.metrics.event(name, arm, seat.backend, seat.config.stage)
