"""The HTTP side: checks requests, hands them to the worker, and writes its events as JSON or as a stream."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rlhf_trainer.serve.batch import Row
from rlhf_trainer.serve.loader import Policy
from rlhf_trainer.serve.metrics import Metrics
from rlhf_trainer.serve.protocol import (
    DONE,
    ChatRequest,
    CompletionRequest,
    Endpoint,
    Envelope,
    RequestError,
    error_body,
    event,
    parse,
)
from rlhf_trainer.serve.worker import Broken, Emit, Event, Finished, Job, Piece, Worker

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for plain completions
_MAX_BODY = 4 << 20


class Server:
    """One policy under one name. `ready` is given by `open_up`, once the model is loaded and warm."""

    def __init__(self, served_name: str, metrics: Metrics) -> None:
        self._name = served_name
        self._metrics = metrics
        self._policy: Policy | None = None
        self._worker: Worker | None = None
        self._running = 0
        self._landed = asyncio.Event()
        self.draining = False

    def open_up(self, policy: Policy, worker: Worker) -> None:
        self._policy, self._worker = policy, worker

    async def quiet(self) -> None:
        """Wait until no answer is being written."""
        while self._running:
            self._landed.clear()
            await self._landed.wait()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/v1/completions", self._handler("completions"))
        app.router.add_post("/v1/chat/completions", self._handler("chat"))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._export)
        app.on_response_prepare.append(self._send_away)
        return app

    def _handler(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._running += 1
            try:
                return await self._answer(endpoint, request)
            except RequestError as error:
                headers = {"Retry-After": "1"} if error.status == 503 else None
                return web.json_response(error_body(error), status=error.status, headers=headers)
            finally:
                self._running -= 1
                self._landed.set()

        return handle

    async def _answer(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        if self._policy is None or self._worker is None:
            raise RequestError("The policy is still loading: wait until /health answers 200.", 503, "loading")
        asked = parse(endpoint, await _body(request))
        if asked.model != self._name:
            message = f"The model {asked.model!r} does not exist here: this server serves {self._name!r}."
            raise RequestError(message, 404, "model_not_found")
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = self._job(asked, self._policy, lambda one: loop.call_soon_threadsafe(events.put_nowait, one))
        self._worker.submit(job)
        envelope = Envelope(endpoint, self._name)
        try:
            if asked.stream:
                return await _stream(request, asked, envelope, events)
            return await _whole(envelope, events)
        finally:
            job.cancelled.set()  # frees the row when the client went away; no effect on a finished one

    def _job(self, asked: CompletionRequest | ChatRequest, policy: Policy, emit: Emit) -> Job:
        prompt = _prompt(asked, policy)
        room = policy.context - len(prompt)
        if not prompt or room < 1:
            advice = "send some text" if not prompt else "shorten it"
            raise RequestError(f"The prompt has {len(prompt)} tokens, the context {policy.context}: {advice}.")
        wanted = asked.max_tokens
        if isinstance(asked, ChatRequest):
            wanted = asked.max_completion_tokens or wanted or room
        wanted = wanted or min(_COMPLETION_TOKENS, room)
        if wanted > room:
            raise RequestError(
                f"max_tokens is {wanted}, but after a prompt of {len(prompt)} tokens only {room} of the context's "
                f"{policy.context} are left: ask for at most {room}.",
                code="context_length_exceeded",
            )
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        temperature = 1.0 if asked.temperature is None else asked.temperature
        return Job(Row(prompt, temperature, seed), wanted, asked.stops, emit)

    async def _models(self, _request: web.Request) -> web.Response:
        listed = [{"id": self._name, "object": "model", "created": 0, "owned_by": "rlhf-operator"}]
        if self._policy is None:
            listed = []
        elif listed:
            listed[0]["max_model_len"] = self._policy.context
        return web.json_response({"object": "list", "data": listed})

    async def _health(self, _request: web.Request) -> web.Response:
        if self._policy is None:
            return web.Response(text="loading\n", status=503)
        if self.draining:
            return web.Response(text="draining\n", status=503)
        return web.Response(text="ok\n")

    async def _export(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _send_away(self, _request: web.Request, response: web.StreamResponse) -> None:
        """While draining, clients on open connections are told to make a new one, which goes to another pod."""
        if self.draining:
            response.headers["Connection"] = "close"
            response.force_close()


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestError(f"The request exceeds {_MAX_BODY} bytes: send less.", 413, "request_too_large") from error


def _prompt(asked: CompletionRequest | ChatRequest, policy: Policy) -> tuple[int, ...]:
    if isinstance(asked, ChatRequest):
        return policy.encode_chat([{"role": one.role, "content": one.content} for one in asked.messages])
    prompt = asked.prompt
    if isinstance(prompt, str):
        return policy.encode(prompt)
    if isinstance(prompt[0], str):
        return policy.encode(prompt[0])
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    ids = tuple(token for token in prompt if isinstance(token, int))
    if any(not 0 <= token < vocabulary for token in ids):
        raise RequestError(f"prompt: token ids must lie between 0 and {vocabulary - 1}.")
    return ids


async def _events(queue: asyncio.Queue[Event]) -> AsyncGenerator[Piece | Finished, None]:
    """Pieces, then the end. Raises RequestError when the answer broke off."""
    while True:
        one = await queue.get()
        if isinstance(one, Broken):
            raise one.error
        yield one
        if isinstance(one, Finished):
            return


async def _whole(envelope: Envelope, queue: asyncio.Queue[Event]) -> web.Response:
    pieces: list[str] = []
    async with aclosing(_events(queue)) as events:
        async for one in events:
            if isinstance(one, Finished):
                return web.json_response(envelope.whole("".join(pieces), one.reason, one.usage))
            pieces.append(one.text)
    raise RequestError("The answer broke off. Retry.", 500, "broken_off")


async def _stream(
    request: web.Request, asked: CompletionRequest | ChatRequest, envelope: Envelope, queue: asyncio.Queue[Event]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    with suppress(ConnectionResetError):  # the client went away: nobody is left to be told
        try:
            async for document in _documents(asked, envelope, queue):
                await response.write(event(document))
            await response.write(DONE)
        except RequestError as error:  # the status line is out: the error goes into the stream, without [DONE]
            await response.write(event(error_body(error)))
        await response.write_eof()
    return response


async def _documents(
    asked: CompletionRequest | ChatRequest, envelope: Envelope, queue: asyncio.Queue[Event]
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of one stream. Raises RequestError when the answer broke off."""
    if (opening := envelope.opening()) is not None:
        yield opening
    async with aclosing(_events(queue)) as events:
        async for one in events:
            if isinstance(one, Piece):
                yield envelope.piece(one.text)
                continue
            yield envelope.closing(one.reason)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield envelope.usage(one.usage)
