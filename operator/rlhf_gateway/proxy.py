"""The traffic port: /v1/* in, one arm's answer out."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from aiohttp import web
from yarl import URL

from rlhf_gateway.assignment import conversation_of
from rlhf_gateway.exchange import Exchange, Parts
from rlhf_gateway.openai import error_body
from rlhf_gateway.seat import Seat, seat_of
from rlhf_gateway.shadow import Shadow
from rlhf_gateway.upstream import Question, forwarded_headers

MAX_QUESTION_BYTES = 8 << 20


class Proxy:
    """Routes requests to arms."""

    def __init__(self, parts: Parts, shadow: Shadow) -> None:
        self._parts = parts
        self._shadow = shadow

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_QUESTION_BYTES)
        app.router.add_route("*", "/v1/{tail:.*}", self.handle)
        app.router.add_route("*", "/{tail:.*}", _unknown_path)
        app.on_response_prepare.append(self._send_away)
        return app

    async def _send_away(self, _request: web.Request, response: web.StreamResponse) -> None:
        """While draining, clients on open connections are told to make a new one, which goes to another pod."""
        if self._parts.state.draining:
            response.headers["Connection"] = "close"
            response.force_close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request by the arm of its conversation."""
        if _leads_out(request.path_qs):
            return await _unknown_path(request)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _refuse(413, f"The request exceeds {MAX_QUESTION_BYTES} bytes: send less.", "request_too_large")
        except web.RequestPayloadError as error:
            return _refuse(400, f"The request's body cannot be read ({error}): send it whole.", "unreadable_request")
        config = self._parts.state.config
        if config is None:
            return _refuse(503, "The gateway has no configuration yet. Retry later.", "not_configured")
        conversation = conversation_of(request.headers, body, config.conversation_key)
        seat = seat_of(config, conversation)
        if seat is None:
            return _refuse(503, "No revision of the policy is in service yet. Retry later.", "no_revision")
        question = Question(request.method, request.path_qs, forwarded_headers(request.headers), body)
        return await self._answer(request, question, seat)

    async def _answer(self, request: web.Request, question: Question, seat: Seat) -> web.StreamResponse:
        if question.method != "POST":  # a model list is no answer of a policy: stable gives it, and nothing is counted
            stable = seat.config.stable
            plain = Seat(seat.config, "stable", stable, seat.conversation) if stable is not None else seat
            return await Exchange(self._parts, request, question, plain, counted=False).answer()
        canary = seat.config.canary
        ejected = canary is not None and self._parts.state.health.ejected(canary.revision)
        # Were stable's conversations counted meanwhile, the split would look as if it were wrong.
        seat = replace(seat, compared=not ejected)
        exchange = Exchange(self._parts, request, question, seat)
        if seat.arm == "canary" and ejected:
            self._parts.state.ledger.divert(seat.row)
            return await exchange.stand_in("ejected")
        if (mirrored := seat.mirrored) is None:
            return await exchange.answer()
        status = asyncio.get_running_loop().create_future()
        self._shadow.offer(mirrored, question, status)
        try:
            response = await exchange.answer()
            status.set_result(response.status)
        finally:
            if not status.done():  # the user left
                status.set_result(exchange.begun)
        return response


def _refuse(status: int, message: str, code: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 503 else None
    return web.json_response(error_body(message, kind, code), status=status, headers=headers)


def _leads_out(path: str) -> bool:
    """Whether `..` in it takes an arm elsewhere: it is resolved on the way there, after the route was chosen here."""
    return not URL(f"http://arm{path}").raw_path.startswith("/v1/")


async def _unknown_path(request: web.Request) -> web.Response:
    return _refuse(
        404, f"Nothing is served at {request.path}: use /v1/completions or /v1/chat/completions.", "not_found"
    )
