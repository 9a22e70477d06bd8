"""Pairs: the same question to the canary too, its answer judged, counted and dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from rlhf_gateway.evidence import Outcome
from rlhf_gateway.flights import SeveredError
from rlhf_gateway.seat import Clerk, Fate, Seat
from rlhf_gateway.state import State
from rlhf_gateway.upstream import Question, Upstream, UpstreamError


class Shadow:
    """Mirrors questions in the background. Bounded: a slow canary costs pairs, never the users' memory or time."""

    def __init__(
        self,
        state: State,
        upstream: Upstream,
        clerk: Clerk,
        limit: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._upstream = upstream
        self._clerk = clerk
        self._limit = limit
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, seat: Seat, question: Question, stable: asyncio.Future[int | None]) -> None:
        """Mirror one question, unless too many are in flight or the canary is known to be dead. ``stable``: the status
        of what the user got, None when the user left before it began."""
        if self._state.health.ejected(seat.backend.revision):
            self._state.ledger.divert(seat.row)
        elif len(self._running) >= self._limit:
            self._clerk.event("shadow_dropped", seat)
        else:
            task = asyncio.create_task(self._mirror(seat, question, stable))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def finish(self) -> None:
        """Wait for the mirrored questions in flight."""
        await asyncio.gather(*self._running)

    async def _mirror(self, seat: Seat, question: Question, stable: asyncio.Future[int | None]) -> None:
        started = self._clock()
        try:
            async with (
                self._state.flights.enter(seat.backend.revision),
                self._upstream.ask(seat.backend, question) as opened,
            ):
                answer = await opened.whole()
        except UpstreamError as error:
            self._state.health.note_failure(seat.backend.revision, error.kind)
            self._clerk.write(seat, Outcome(failed=True), Fate())
            return
        except SeveredError:
            self._clerk.event("severed", seat)
            return
        elapsed = (self._clock() - started) * 1000
        violating = await self._clerk.judge(answer)
        outcome = Outcome(
            failed=answer.status >= 500 or (answer.status >= 400 and _accepted(await stable)),
            violating=violating,
            latency_ms=elapsed if answer.status < 300 else None,
        )
        self._clerk.write(seat, outcome, Fate())


def _accepted(status: int | None) -> bool:
    """Whether a question that the canary refuses was no mistake of the user, as stable answered it."""
    return status is not None and status < 400
