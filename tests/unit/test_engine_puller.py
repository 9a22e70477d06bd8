"""Pulls: over a real HTTP server, and what wakes a key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from rlhf_operator.engine.puller import Puller, PullError, http_fetch
from rlhf_operator.kinds.base import Key, Pull
from rlhf_operator.obs.metrics import Metrics

ADA = Key("Widget", "ns", "ada")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Pod:
    """Answers with what it is told to."""

    def __init__(self) -> None:
        self.authorization: list[str | None] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.authorization.append(request.headers.get("Authorization"))
        if request.path == "/slow":
            await asyncio.sleep(30)
        if request.path == "/big":
            return web.json_response("x" * (1 << 20))
        if request.path == "/text":
            return web.Response(text="not json")
        if request.path == "/deep":
            return web.Response(text="[" * 100_000)
        if request.path == "/away":
            raise web.HTTPFound("/status")
        if request.path == "/broken":
            raise web.HTTPInternalServerError
        return web.json_response({"step": 1})


@pytest.fixture
async def pod() -> AsyncIterator[tuple[Pod, str]]:
    made, app = Pod(), web.Application()
    app.router.add_get("/{path:.*}", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield made, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def test_an_answer_is_json_and_the_token_is_sent_only_where_it_is_wanted(pod, session) -> None:
    served, url = pod
    fetch = http_fetch(session, lambda: "secret")

    assert await fetch(Pull("a", f"{url}/status", 1)) == {"step": 1}
    await fetch(Pull("b", f"{url}/status", 1, authenticated=True))

    assert served.authorization == [None, "Bearer secret"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/text", "not JSON"),
        ("/deep", "not JSON"),
        ("/broken", "HTTP 500"),
        ("/away", "HTTP 302"),
        ("/big", "more than"),
        ("/slow", "TimeoutError"),
    ],
)
async def test_what_is_no_answer_says_why(pod, session, path: str, problem: str) -> None:
    fetch = http_fetch(session, lambda: None, timeout=0.3)

    with pytest.raises(PullError, match=problem):
        await fetch(Pull("a", pod[1] + path, 1))


async def test_nobody_there_and_no_token_are_errors_of_the_pull(session) -> None:
    fetch = http_fetch(session, lambda: None, timeout=1)

    with pytest.raises(PullError, match="ClientConnector"):
        await fetch(Pull("a", "http://127.0.0.1:1/status", 1))
    with pytest.raises(PullError, match="no token"):
        await fetch(Pull("a", "http://127.0.0.1:1/status", 1, authenticated=True))
    with pytest.raises(PullError):
        await fetch(Pull("a", "no url at all", 1))


class Source:
    """What comes next: a body, or an error."""

    def __init__(self) -> None:
        self.next: Any = {"step": 0}
        self.calls = 0
        self.third = asyncio.Event()

    async def __call__(self, _: Pull) -> Any:
        self.calls += 1
        if self.calls == 3:
            self.third.set()
        if isinstance(self.next, Exception):
            raise self.next
        return self.next


@pytest.fixture
def woken() -> list[Key]:
    return []


async def test_a_key_is_woken_by_changes_and_flips_only_and_the_last_body_survives_errors(woken: list[Key]) -> None:
    source = Source()
    puller = Puller(source, woken.extend, Metrics(), now=lambda: NOW)
    pull = Pull("status", "http://pod/status", 3600)
    puller.want(ADA, [pull])
    assert puller.answers(ADA) == {}

    async def again(value: Any) -> int:
        before = len(woken)
        source.next = value
        await puller.once(ADA, pull)
        return len(woken) - before

    assert await again({"step": 1}) == 1
    assert await again({"step": 1}) == 0
    assert await again({"step": 2}) == 1
    assert await again(PullError("gone")) == 1
    assert await again(PullError("still gone")) == 0
    answer = puller.answers(ADA)["status"]
    assert (answer.body, answer.error, answer.failing_since, answer.at) == ({"step": 2}, "still gone", NOW, NOW)
    assert await again({"step": 2}) == 1
    answer = puller.answers(ADA)["status"]
    assert (answer.error, answer.failing_since) == (None, None)
    puller.stop()


async def test_pulls_start_repeat_and_stop_as_plans_name_them(woken: list[Key]) -> None:
    source = Source()
    puller = Puller(source, woken.extend, Metrics(), now=lambda: NOW)
    pull = Pull("status", "http://pod/status", 0.001)
    puller.want(ADA, [pull])
    puller.want(ADA, [pull])
    async with asyncio.timeout(5):
        await source.third.wait()
    assert puller.answers(ADA)["status"].body == {"step": 0}

    slower = Pull("status", "http://pod/status", 3600)
    puller.want(ADA, [slower])
    assert puller.answers(ADA)["status"].body == {"step": 0}, "the same pod: what is known stays known"
    puller.want(ADA, [Pull("status", "http://another/status", 3600)])
    assert puller.answers(ADA) == {}, "another pod: what is known is not about it"
    puller.want(ADA, ())
    assert puller.answers(ADA) == {}
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("pull-") and not task.cancelling()]
