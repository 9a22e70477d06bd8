"""One user's request, from question to answer. The user gets exactly one answer, from one arm.

A canary that fails, or whose answer trips the safety filter, is answered for by stable, as long as nothing has been
sent. A request that the canary refuses (4xx) is put to stable too: what stable answers was not the user's mistake. What
the canary did is counted against the canary; stable's stand-in is no sample of stable, because its prompts were chosen
by the canary's failures. A shadowed canary that refuses what stable answers has failed in the same sense.

Where stand-ins on safety hits are asked for, both arms are read whole before anything is sent: sent tokens cannot be
recalled, and buffering one arm only would bias latency.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Literal

from aiohttp import web
from multidict import CIMultiDict

from rlhf_gateway.evidence import Outcome
from rlhf_gateway.flights import SeveredError
from rlhf_gateway.openai import EVENT_STREAM, error_body, error_event
from rlhf_gateway.seat import Clerk, Fate, Seat
from rlhf_gateway.state import State
from rlhf_gateway.upstream import Answer, OpenAnswer, Question, Upstream, UpstreamError
from rlhf_gateway.wire import ARM_HEADER, FALLBACK_HEADER, REVISION_HEADER

Reason = Literal["safety", "failure", "refused", "ejected", "severed"]


@dataclass(frozen=True)
class Parts:
    """What every exchange needs."""

    state: State
    upstream: Upstream
    clerk: Clerk
    clock: Callable[[], float] = time.monotonic


class Exchange:
    """Answers one question. `seat` is who shall answer; `instead_of` is set while stable stands in for a canary."""

    def __init__(
        self, parts: Parts, request: web.Request, question: Question, seat: Seat, counted: bool = True
    ) -> None:
        self._parts = parts
        self._request = request
        self._question = question
        self._seat = seat
        self._counted = counted
        self._instead_of: Seat | None = None
        self._instead: Exchange | None = None
        self._reason: Reason | None = None
        self._streaming: web.StreamResponse | None = None
        self._received: list[bytes] = []

    @property
    def begun(self) -> int | None:
        """The status of a stream that has begun to reach the user, whoever gives it."""
        if self._instead is not None:
            return self._instead.begun
        return self._streaming.status if self._streaming is not None else None

    async def answer(self) -> web.StreamResponse:
        """The user's response. Raises nothing but CancelledError, when the user went away."""
        started = self._parts.clock()
        try:
            async with self._parts.state.flights.enter(self._seat.backend.revision):
                answer = await self._hear()
        except UpstreamError as error:
            return await self._failed(error)
        except SeveredError as error:
            return await self._severed(error)
        except asyncio.CancelledError:
            await self._abandoned(started)
            raise
        except ConnectionResetError:  # from writing to the user: the arm's own are UpstreamErrors
            await self._abandoned(started)
            return self._streaming or web.Response()
        return await self._heard(answer, (self._parts.clock() - started) * 1000)

    async def stand_in(self, reason: Reason) -> web.StreamResponse:
        """Stable's answer in place of the canary's."""
        config = self._parts.state.config or self._seat.config
        self._parts.clerk.event("reanswers", self._seat)
        if config.stable is None:
            self._parts.clerk.event("reanswer_failures", self._seat)
            return _error(502, "The canary gave no answer and there is no stable revision to stand in. Retry later.")
        self._instead = instead = Exchange(self._parts, self._request, self._question, self._seat)
        instead._instead_of, instead._reason = self._seat, reason
        instead._seat = replace(self._seat, arm="stable", backend=config.stable)
        return await instead.answer()

    async def _hear(self) -> Answer:
        """Ask the arm; relay a stream as it comes, unless answers must be read whole first."""
        alone = self._seat.arm == "stable"  # nobody stands in for it
        async with self._parts.upstream.ask(self._seat.backend, self._question, patient=alone) as opened:
            if opened.streams and opened.status < 300 and not self._seat.config.fallback_on_safety_hit:
                return await self._relay(opened)
            return await opened.whole()

    async def _relay(self, opened: OpenAnswer) -> Answer:
        async with aclosing(opened.chunks()) as chunks:
            async for chunk in chunks:
                if self._streaming is None:  # only now is the user bound to this arm
                    self._streaming = web.StreamResponse(status=opened.status, headers=self._headers(opened.headers))
                    await self._streaming.prepare(self._request)
                self._received.append(chunk)
                await self._streaming.write(chunk)
        return Answer(opened.status, opened.headers, b"".join(self._received))

    async def _heard(self, answer: Answer, elapsed_ms: float) -> web.StreamResponse:
        if self._seat.arm == "canary" and 400 <= answer.status < 500:
            return await self._refused()
        violating = await self._judged(answer, elapsed_ms)
        failed = answer.status >= 500
        canary = self._seat.arm == "canary"
        tripped = bool(violating) and self._streaming is None and self._seat.config.fallback_on_safety_hit
        replaced: Reason | None = None
        if canary and (failed or tripped):
            replaced = "failure" if failed else "safety"
        outcome = Outcome(
            failed=failed,
            violating=violating,
            harmful_served=bool(violating) and replaced is None,
            latency_ms=elapsed_ms if answer.status < 300 else None,
        )
        self._write(
            outcome, Fate(self._seat.backend.revision, answer.status) if not replaced else Fate(fallback=replaced)
        )
        if replaced:
            return await self.stand_in(replaced)
        if self._streaming is not None:
            with suppress(ConnectionResetError):  # the user left after the last token: the answer was whole
                await self._streaming.write_eof()
            return self._streaming
        return web.Response(status=answer.status, headers=self._headers(answer.headers), body=answer.body)

    async def _judged(self, answer: Answer, elapsed_ms: float) -> bool | None:
        """Whether the answer trips the filter. A user who leaves meanwhile, as many do at a stream's last token, takes
        neither the verdict nor the sample along."""
        judging = asyncio.ensure_future(self._parts.clerk.judge(answer))
        try:
            return await asyncio.shield(judging)
        except asyncio.CancelledError:
            violating = await judging
            self._parts.clerk.event("abandoned", self._seat)
            served = bool(violating) and self._streaming is not None
            latency_ms = elapsed_ms if answer.status < 300 else None
            self._write(Outcome(answer.status >= 500, violating, served, latency_ms), Fate())
            raise

    async def _refused(self) -> web.StreamResponse:
        """The canary says that the user is wrong: it is the canary that is, when stable disagrees. That is known, and
        counted, as soon as stable's answer begins, also when the user leaves before its end."""
        status: int | None = None
        try:
            response = await self.stand_in("refused")
            status = response.status
        finally:
            status = status or self.begun
            failed = status is not None and status < 400
            self._write(Outcome(failed=failed), Fate(status=status, fallback="refused"))
        return response

    async def _failed(self, error: UpstreamError) -> web.StreamResponse:
        self._parts.state.health.note_failure(self._seat.backend.revision, error.kind)
        # After a timeout the user's patience is spent: asking stable as well would double it.
        rescued = self._seat.arm == "canary" and self._streaming is None and error.kind != "timeout"
        status = 504 if error.kind == "timeout" else 502
        violating = await self._judge_received()
        outcome = Outcome(failed=True, violating=violating, harmful_served=bool(violating))
        self._write(outcome, Fate(fallback="failure") if rescued else Fate(status=status))
        if rescued:
            return await self.stand_in("failure")
        return await self._broken(status, f"The policy gave no whole answer: {error}. Retry later.")

    async def _severed(self, error: SeveredError) -> web.StreamResponse:
        self._parts.clerk.event("severed", self._seat)
        violating = await self._judge_received()
        self._write(Outcome(violating=violating, harmful_served=bool(violating)), Fate())
        if self._streaming is None and self._instead_of is None:
            return await self.stand_in("severed")
        return await self._broken(502, f"The answer was cut: {error}. Ask again.")

    async def _broken(self, status: int, message: str) -> web.StreamResponse:
        """Tell the user that there is no whole answer, inside the stream where one has begun."""
        if self._streaming is None:
            return _error(status, message)
        with suppress(ConnectionResetError):
            await self._streaming.write(error_event(message, "server_error", "upstream_failed"))
            await self._streaming.write_eof()
        return self._streaming

    async def _abandoned(self, started: float) -> None:
        """The user went away: no failure of the arm, but it took at least this long."""
        self._parts.clerk.event("abandoned", self._seat)
        elapsed_ms = (self._parts.clock() - started) * 1000
        violating = await self._judge_received()
        self._write(Outcome(violating=violating, harmful_served=bool(violating), latency_ms=elapsed_ms), Fate())

    async def _judge_received(self) -> bool | None:
        """What reached the user of an answer that broke off is judged too: harm does not need the last token. Users who
        leave meanwhile do not end it."""
        if self._streaming is None:
            return None
        judging = asyncio.ensure_future(self._parts.clerk.judge_part(EVENT_STREAM, b"".join(self._received)))
        with suppress(asyncio.CancelledError):
            return await asyncio.shield(judging)
        return await judging

    def _write(self, outcome: Outcome, fate: Fate) -> None:
        if self._instead_of is not None:
            if outcome.failed:
                self._parts.clerk.event("reanswer_failures", self._instead_of)
            elif outcome.harmful_served:
                self._parts.state.ledger.harmful_reanswer(self._seat.row)
        elif self._counted:
            self._parts.clerk.write(self._seat, outcome, fate)

    def _headers(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        named = headers.copy()
        named[ARM_HEADER] = self._seat.arm
        named[REVISION_HEADER] = self._seat.backend.revision
        if self._reason is not None:
            named[FALLBACK_HEADER] = self._reason
        return named


def _error(status: int, message: str) -> web.Response:
    return web.json_response(error_body(message, "server_error", "upstream_failed"), status=status)
