"""One arm's answer to one request, over HTTP.

What may be tried again, and by whom:

* Before any byte of the response arrived, a lost or refused connection is tried once more on the same arm, for both
  arms alike: a pooled connection that the server had just closed, or one dead pod behind a Service, is not the
  policy's failure. Completions have no effect besides their answer, so asking twice is safe; answering twice is not,
  and cannot happen, because nothing has been sent to the user yet.
* Where nobody could stand in for the arm (stable), refused connections are tried for most of a second: right after
  pods became ready or moved, a node may not route to them yet. A canary gets no such patience: stable answers at once.
* A timeout is never tried again: the user's patience is spent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

import aiohttp
from multidict import CIMultiDict

from rlhf_gateway.openai import EVENT_STREAM
from rlhf_gateway.wire import Backend

FailureKind = Literal["refused", "unreachable", "disconnected", "timeout", "oversized"]
RETRIED: frozenset[FailureKind] = frozenset({"refused", "unreachable", "disconnected"})
_PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds, while a Service without alternative refuses connections

# RFC 9110 section 7.6.1, plus what this hop decides by itself: a question was read whole, so that nobody is asked
# whether to send it, and a server that never answers that would be waited for in vain.
_NOT_FORWARDED = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "host", "content-length", "accept-encoding", "expect"}
)  # fmt: skip
_DECODED = frozenset({"gzip", "deflate", "br", "zstd"})  # question bodies: by aiohttp's server, before they are read
_NOT_RETURNED = _NOT_FORWARDED | {"content-encoding", "server", "date"}


class UpstreamError(Exception):
    """The arm gave no whole answer. `kind` decides what may be done about it."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes. `connect` is short: a Service whose pods are gone should not cost a user a second."""

    connect_seconds: float = 2.0
    total_seconds: float = 120.0
    answer_bytes: int = 16 << 20


@dataclass(frozen=True)
class Question:
    """A user's request, read whole, so that it can be asked of either arm."""

    method: str
    path: str  # with query
    headers: CIMultiDict[str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """An arm's whole response."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "")


class OpenAnswer:
    """An arm's response whose headers have arrived; the body is still to be read."""

    def __init__(self, response: aiohttp.ClientResponse, limits: Limits) -> None:
        self._response = response
        self._limits = limits
        self.status = response.status
        self.headers = returned_headers(response.headers)

    @property
    def streams(self) -> bool:
        return self.headers.get("Content-Type", "").startswith(EVENT_STREAM)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises UpstreamError when it ends before it is whole."""
        total = 0
        with _translated():
            async for chunk in self._response.content.iter_any():
                total += len(chunk)
                if total > self._limits.answer_bytes:
                    raise UpstreamError("oversized", f"the answer exceeds {self._limits.answer_bytes} bytes")
                yield chunk

    async def whole(self) -> Answer:
        """The body in one piece. Raises UpstreamError."""
        body = b"".join([chunk async for chunk in self.chunks()])
        return Answer(self.status, self.headers, body)


class Upstream:
    """Asks backends. Owns no session: the caller closes what it gave."""

    def __init__(self, session: aiohttp.ClientSession, limits: Limits) -> None:
        self._session = session
        self._limits = limits
        self._timeout = aiohttp.ClientTimeout(total=limits.total_seconds, sock_connect=limits.connect_seconds)

    @asynccontextmanager
    async def ask(self, backend: Backend, question: Question, *, patient: bool = False) -> AsyncIterator[OpenAnswer]:
        """Send the question; yields once the response's headers are there. Raises UpstreamError.

        ``patient``: nobody else can answer, so wait a moment for somebody to accept the connection.

        Leaving the block without having read the body closes the connection, which tells the server to stop.
        """
        response = await self._send(backend, question, _PAUSES if patient else ())
        try:
            yield OpenAnswer(response, self._limits)
        finally:
            response.release() if response.content.at_eof() else response.close()

    async def _send(self, backend: Backend, question: Question, pauses: Sequence[float]) -> aiohttp.ClientResponse:
        try:
            return await self._send_once(backend, question)
        except UpstreamError as error:
            if error.kind not in RETRIED:
                raise
        for pause in pauses:
            try:
                return await self._send_once(backend, question)
            except UpstreamError as error:
                if error.kind != "refused":
                    raise
            await asyncio.sleep(pause)
        return await self._send_once(backend, question)

    async def _send_once(self, backend: Backend, question: Question) -> aiohttp.ClientResponse:
        with _translated():
            return await self._session.request(
                question.method,
                backend.url.rstrip("/") + question.path,
                headers=question.headers,
                data=question.body or None,
                timeout=self._timeout,
                allow_redirects=False,
            )


@contextmanager
def _translated() -> Iterator[None]:
    """aiohttp's exceptions as UpstreamError."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise UpstreamError("refused", f"cannot connect: {error}") from error
    except aiohttp.ConnectionTimeoutError as error:
        raise UpstreamError("unreachable", "no connection in time") from error
    except TimeoutError as error:
        raise UpstreamError("timeout", "no whole answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError("disconnected", f"the connection broke: {error!r}") from error


def forwarded_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """A user's headers as an arm shall see them: the question is no longer compressed, and the answer shall not be."""
    kept = _without(headers, _NOT_FORWARDED)
    if kept.get("Content-Encoding", "").lower() in _DECODED:
        del kept["Content-Encoding"]
    kept["Accept-Encoding"] = "identity"
    return kept


def returned_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """An arm's headers as the user shall see them. An answer that came compressed all the same has been decoded, for
    the safety filter must read it."""
    return _without(headers, _NOT_RETURNED)


def _without(headers: Mapping[str, str], dropped: frozenset[str]) -> CIMultiDict[str]:
    """Without those, and without what the sender calls a matter of its own connection."""
    own = [value.split(",") for name, value in headers.items() if name.lower() == "connection"]
    gone = dropped.union(name.strip().lower() for names in own for name in names)
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in gone)
