"""What of a question reaches a policy, and what of an answer its user: paths, headers, encodings."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from pathlib import Path

import pytest
from aiohttp import web
from yarl import URL

from rlhf_gateway.openai import answers
from rlhf_gateway.upstream import Limits
from tests.unit.gateway_world import counts_of, eventually, secret_filter, serving, talks_on, world

HALF = {"canary_weight_percent": 50.0}
ON_CANARY = talks_on("canary", 50.0, 5)


async def test_body_query_and_headers_reach_the_policy_but_compression_does_not() -> None:
    async with world() as w:
        await w.configure(canary=None)
        headers = {"Authorization": "Bearer user-key", "Accept-Encoding": "gzip"}
        await w.client.post(f"{w.url}/v1/chat/completions?x=1", json={"messages": [], "n": 1}, headers=headers)
        (call,) = w.stable.calls
        assert call["body"] == {"messages": [], "n": 1}
        assert call["headers"]["Authorization"] == "Bearer user-key"
        assert call["headers"]["Accept-Encoding"] == "identity"


async def test_a_question_is_sent_whole_to_a_server_that_does_not_ask_for_it() -> None:
    """Clients announce large questions. The gateway has answered that, and a server need not."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            heads.append(head)
            await reader.readexactly(len(b'{"prompt": "hello"}'))
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close, X-Pool\r\nX-Pool: 3\r\nX-Model: m\r\nContent-Length: 0\r\n\r\n"
        )
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    limits = Limits(total_seconds=2.0)
    async with server, world(limits=limits) as w:
        w.stable.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await w.configure(canary=None)
        headers = {"Expect": "100-continue", "Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-End": "1"}
        async with w.client.post(f"{w.url}/v1/completions", json={"prompt": "hello"}, headers=headers) as response:
            assert response.status == 200, await response.text()
            # What either side calls a matter of its own connection ends there.
            assert ("X-Pool" in response.headers, response.headers["X-Model"]) == (False, "m")
        (head,) = heads
        assert (b"X-Hop" in head, b"X-End" in head) == (False, True)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_question_reaches_the_policy_plain_and_says_so(encoding: str) -> None:
    async with world() as w:
        await w.configure(canary=None)
        compress = gzip.compress if encoding == "gzip" else zlib.compress
        packed = compress(json.dumps({"prompt": "hello", "user": "ada"}).encode())
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        async with w.client.post(f"{w.url}/v1/completions", data=packed, headers=headers) as response:
            assert response.status == 200, await response.text()
        assert w.stable.calls[0]["body"]["prompt"] == "hello"
        assert (await w.pull()).units == {"user": 1}


async def test_a_question_that_cannot_be_unpacked_is_the_users_mistake() -> None:
    async with world() as w:
        await w.configure(canary=None)
        headers = {"Content-Encoding": "gzip"}
        async with w.client.post(f"{w.url}/v1/completions", data=b"plain", headers=headers) as response:
            assert response.status == 400
            assert "cannot be read" in (await response.json())["error"]["message"]
        assert (w.stable.calls, (await w.pull()).counts) == ([], ())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_policy_that_compresses_unasked_is_read_and_judged_as_any_other(tmp_path: Path, stream: bool) -> None:
    async with world() as w:
        await w.configure(**HALF, fallback_on_safety_hit=True, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.compress = w.stable.compress = True
        w.canary.text = "your secret pin"
        response = await w.ask(ON_CANARY[0], stream=stream)
        assert response.headers.get("X-RLHF-Fallback") == "safety"
        assert "thank" in "".join(answers(response.headers["Content-Type"], await response.read()))
        assert counts_of(await w.pull(), "canary").violations == 1


async def test_model_lists_come_from_stable_and_are_no_evidence() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=100.0)
        async with w.client.get(f"{w.url}/v1/models", headers={"X-Conversation-Id": "c"}) as response:
            assert (await response.json())["data"][0]["id"] == "desk"
            assert response.headers["X-RLHF-Arm"] == "stable"
        assert (await w.pull()).counts == ()


async def test_unknown_paths_and_large_requests_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_gateway.proxy.MAX_QUESTION_BYTES", 1000)
    async with world() as w:
        await w.configure()
        async with w.client.post(f"{w.url}/generate") as response:
            assert response.status == 404
            assert "use /v1/completions" in await response.text()
        async with w.client.post(f"{w.url}/v1/completions", data=b"x" * 2000) as response:
            assert response.status == 413
            assert "send less" in await response.text()


@pytest.mark.parametrize("path", ["/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/x/../../sleep"])
async def test_no_path_leads_out_of_what_a_policy_serves_to_users(path: str) -> None:
    """Model servers have other paths beside it: metrics, and with some of them how to unload the model."""
    reached: list[str] = []

    async def reach(request: web.Request) -> web.Response:
        reached.append(request.raw_path)
        return web.Response()

    server = web.Application()
    server.router.add_route("*", "/{tail:.*}", reach)
    async with world() as w, serving(server) as (w.stable.url, _):
        await w.configure(canary=None)
        async with w.client.post(URL(w.url + path, encoded=True), json={}) as response:
            assert response.status == 404, reached
            assert "use /v1/completions" in (await response.json())["error"]["message"]
        assert set(reached) <= {"/health"}
