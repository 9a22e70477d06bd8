"""Requests through a real gateway: who answers, what is counted, and what users never see."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from rlhf_gateway.openai import answers
from rlhf_gateway.upstream import Limits, Question, Upstream, UpstreamError
from rlhf_gateway.wire import ArmCounts, Backend
from rlhf_trainer.safety.scorer import LinearFilter
from tests.unit.gateway_world import FakePolicy, counts_of, eventually, secret_filter, serving, talks_on, world

HALF = {"canary_weight_percent": 50.0}
ON_CANARY = talks_on("canary", 50.0, 5)
ON_STABLE = talks_on("stable", 50.0, 5)


async def test_without_a_configuration_the_answer_says_so() -> None:
    async with world() as w:
        response = await w.ask()
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert "no configuration" in (await response.json())["error"]["message"]


async def test_answers_come_from_the_assigned_arm_and_name_it() -> None:
    async with world() as w:
        await w.configure(**HALF)
        for talk, arm, revision in ((ON_CANARY[0], "canary", "rev-canary"), (ON_STABLE[0], "stable", "rev-stable")):
            response = await w.ask(talk)
            assert (response.status, response.headers["X-RLHF-Arm"]) == (200, arm)
            assert response.headers["X-RLHF-Revision"] == revision
            assert "X-RLHF-Fallback" not in response.headers
        evidence = await w.pull()
        assert counts_of(evidence, "canary").conversations == counts_of(evidence, "stable").conversations == 1
        assert evidence.units == {"header": 2}


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


async def test_a_stream_is_relayed_token_by_token() -> None:
    async with world() as w:
        await w.configure(canary=None)
        w.stable.hold = asyncio.Event()
        body = {"prompt": "hello", "stream": True}
        async with w.client.post(f"{w.url}/v1/completions", json=body) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            first = await response.content.readline()
            assert b"thank" in first  # while the policy still holds the rest back
            w.stable.hold.set()
            rest = await response.content.read()
            assert answers("text/event-stream", first + rest) == (" thank you for asking",)
            assert rest.endswith(b"[DONE]\n\n")


@pytest.mark.parametrize(("status", "expected"), [(500, 500), (503, 503)])
async def test_a_failing_stable_answer_is_passed_on_and_counted(status: int, expected: int) -> None:
    async with world() as w:
        await w.configure(canary=None)
        w.stable.status = status
        assert (await w.ask("c")).status == expected
        row = counts_of(await w.pull(), "stable")
        assert (row.failures, row.failed_conversations, sum(row.latency_buckets)) == (1, 1, 0)


async def test_a_users_own_mistake_is_no_failure() -> None:
    async with world() as w:
        await w.configure(canary=None)
        w.stable.status = 400
        assert (await w.ask("c")).status == 400
        row = counts_of(await w.pull(), "stable")
        assert (row.requests, row.failures, row.judged) == (1, 0, 0)


@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failing_canary_is_answered_for_by_stable(fault: str, stream: bool) -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.status, w.canary.break_after = (500, None) if fault == "500" else (200, -1)
        response = await w.ask(ON_CANARY[0], stream=stream)
        assert (response.status, response.headers["X-RLHF-Arm"]) == (200, "stable")
        assert response.headers["X-RLHF-Fallback"] == "failure"
        evidence = await w.pull()
        assert counts_of(evidence, "canary").failures == 1
        assert counts_of(evidence, "stable").requests == 0  # a stand-in is no sample of stable
        assert len(w.stable.calls) == 1


async def test_a_stream_cut_before_its_first_token_is_answered_for_once() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.break_after = 0
        response = await w.ask(ON_CANARY[0], stream=True)
        assert response.headers["X-RLHF-Fallback"] == "failure"
        assert answers("text/event-stream", await response.read()) == (" thank you for asking",)


async def test_a_stream_cut_after_its_first_token_is_never_served_twice() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.break_after = 2
        response = await w.ask(ON_CANARY[0], stream=True)
        body = await response.read()
        assert response.headers["X-RLHF-Arm"] == "canary"
        assert answers("text/event-stream", body) == (" thank you",)
        assert b"upstream_failed" in body
        assert b"[DONE]" not in body
        assert w.stable.calls == []
        assert counts_of(await w.pull(), "canary").failures == 1


async def test_a_connection_lost_before_the_answer_is_tried_again_once_on_the_same_arm() -> None:
    async with world() as w:
        await w.configure(canary=None)
        w.stable.break_after = -1
        assert (await w.ask("c")).status == 502
        assert len(w.stable.calls) == 2
        assert counts_of(await w.pull(), "stable").failures == 1


async def test_a_refusal_that_stable_does_not_share_is_the_canarys_failure() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.status = 400
        response = await w.ask(ON_CANARY[0])
        assert (response.status, response.headers["X-RLHF-Fallback"]) == (200, "refused")
        assert counts_of(await w.pull(), "canary").failures == 1
        w.stable.status = 400
        assert (await w.ask(ON_CANARY[1])).status == 400
        row = counts_of(await w.pull(), "canary")
        assert (row.requests, row.failures) == (2, 1)  # the second was the user's own mistake


async def test_a_timeout_is_not_tried_again() -> None:
    async with world(limits=Limits(total_seconds=0.1)) as w:
        await w.configure(**HALF)
        w.canary.hold = asyncio.Event()
        response = await w.ask(ON_CANARY[0])
        assert response.status == 504
        assert (len(w.canary.calls), len(w.stable.calls)) == (1, 0)
        assert counts_of(await w.pull(), "canary").failures == 1


async def test_a_user_who_leaves_is_no_failure_of_the_arm() -> None:
    async with world() as w:
        await w.configure(canary=None)
        w.stable.hold = asyncio.Event()
        with pytest.raises(TimeoutError):
            await w.client.post(
                f"{w.url}/v1/completions", json={"prompt": "x"}, timeout=aiohttp.ClientTimeout(total=0.1)
            )
        await eventually(lambda: w.gateway.ledger.snapshot(0).counts)
        row = counts_of(await w.pull(), "stable")
        assert (row.requests, row.failures, sum(row.latency_buckets)) == (1, 0, 1)
        assert w.gateway.state.flights.counts() == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_canary_answer_that_trips_the_filter_never_reaches_the_user(tmp_path: Path, stream: bool) -> None:
    async with world() as w:
        await w.configure(**HALF, fallback_on_safety_hit=True, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = "your s3cret pin"
        response = await w.ask(ON_CANARY[0], stream=stream)
        assert (response.headers["X-RLHF-Arm"], response.headers["X-RLHF-Fallback"]) == ("stable", "safety")
        assert b"pin" not in await response.read()
        row = counts_of(await w.pull(), "canary")
        assert (row.judged, row.violations, row.harmful_served, row.violating_conversations) == (1, 1, 0, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_without_fallback_a_tripped_answer_is_counted_as_served(tmp_path: Path, stream: bool) -> None:
    async with world() as w:
        await w.configure(**HALF, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = "your secret pin"
        response = await w.ask(ON_CANARY[0], stream=stream)
        assert response.headers["X-RLHF-Arm"] == "canary"
        await eventually(lambda: w.gateway.ledger.snapshot(0).counts)
        assert counts_of(await w.pull(), "canary").harmful_served == 1


async def test_harm_in_a_stream_that_broke_off_is_seen_too(tmp_path: Path) -> None:
    async with world() as w:
        await w.configure(**HALF, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text, w.canary.break_after = "a secret for you", 3
        await w.ask(ON_CANARY[0], stream=True)
        row = counts_of(await w.pull(), "canary")
        assert (row.failures, row.violations, row.harmful_served) == (1, 1, 1)


@pytest.mark.parametrize("end", ["left", "severed", "broken"])
async def test_long_answers_that_broke_off_are_judged_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A rollback that severs a hundred of them would else stand still for as long as they take, with everybody else."""
    threads: list[int] = []
    plain = LinearFilter.violates

    def noted(self: LinearFilter, text: str) -> bool:
        threads.append(threading.get_ident())
        return plain(self, text)

    monkeypatch.setattr(LinearFilter, "violates", noted)
    async with world() as w:
        filters = {"safety_filter": secret_filter(tmp_path), "rollback_mode": "sever"}
        await w.configure(**HALF, **filters)
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = "secret" + "-and-more" * 200 + " end"
        w.canary.hold, w.canary.break_after = (None, 1) if end == "broken" else (asyncio.Event(), None)
        url, body, headers = f"{w.url}/v1/completions", {"stream": True}, {"X-Conversation-Id": ON_CANARY[0]}
        async with aiohttp.ClientSession() as user, user.post(url, json=body, headers=headers) as response:
            await response.content.readline()
            if end == "severed":
                await w.configure(canary=None, **filters)
            if end != "left":
                assert b"upstream_failed" in await response.read()
        await eventually(lambda: counts_of(w.gateway.ledger.snapshot(0), "canary").requests)
        row = counts_of(await w.pull(), "canary")
        assert (row.violations, row.harmful_served, row.failures) == (1, 1, int(end == "broken"))
        assert threads
        assert threading.get_ident() not in threads


async def test_a_user_who_leaves_at_the_last_token_takes_no_verdict_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    plain = LinearFilter.violates

    def slowly(self: LinearFilter, text: str) -> bool:
        begun.set()
        go.wait(5.0)
        return plain(self, text)

    monkeypatch.setattr(LinearFilter, "violates", slowly)
    async with world() as w:
        await w.configure(**HALF, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = "a secret " + "and a word more " * 100  # long answers are judged on a thread
        body, headers = {"prompt": "x", "stream": True}, {"X-Conversation-Id": ON_CANARY[0]}
        async with aiohttp.ClientSession() as user:
            async with user.post(f"{w.url}/v1/completions", json=body, headers=headers) as response:
                while await response.content.readline() != b"data: [DONE]\n":
                    pass
            await eventually(begun.is_set)
        assert w.gateway.ledger.snapshot(0).counts == ()
        leaving = w.gateway._traffic
        assert leaving is not None
        assert leaving.server is not None
        await eventually(lambda: not any(handler.transport for handler in leaving.server.connections))
        go.set()
        await eventually(lambda: w.gateway.ledger.snapshot(0).counts)
        row = counts_of(await w.pull(), "canary")
        assert (row.requests, row.conversations, row.violations, row.harmful_served) == (1, 1, 1, 1)


CALL = {"index": 0, "type": "function", "function": {"name": "note", "arguments": '{"text": "a s'}}
MORE = {"index": 0, "function": {"arguments": 'ecret"}'}}
CHANNELS = [
    ([{"content": "a s"}, {"content": "ecret"}], ("a secret",)),
    ([{"reasoning_content": "a s", "reasoning": "a s"}, {"reasoning_content": "ecret"}], ("a s", "a secret")),
    ([{"reasoning": "a s"}, {"reasoning": "ecret"}, {"content": "fine"}], ("fine", "a secret")),
    ([{"refusal": "a secret"}], ("a secret",)),
    ([{"tool_calls": [CALL]}, {"tool_calls": [MORE]}], ('{"text": "a secret"}',)),
]


@pytest.mark.parametrize(("deltas", "expected"), CHANNELS)
def test_every_channel_of_an_answer_is_read_for_itself(deltas: list[dict[str, Any]], expected: tuple[str, ...]) -> None:
    """vLLM's server calls its reasoning `reasoning`, others `reasoning_content`, and some send both."""
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() for delta in deltas]
    assert answers("text/event-stream", b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)) == expected


def was_asked(policy: FakePolicy) -> bool:
    return bool(policy.calls)


@pytest.mark.parametrize("buffered", [True, False])
async def test_where_answers_may_be_replaced_both_arms_are_buffered_alike(tmp_path: Path, buffered: bool) -> None:
    async with world() as w:
        await w.configure(**HALF, fallback_on_safety_hit=buffered, safety_filter=secret_filter(tmp_path))
        for policy, talk in ((w.stable, ON_STABLE[0]), (w.canary, ON_CANARY[0])):
            policy.hold = asyncio.Event()
            body, headers = {"prompt": "x", "stream": True}, {"X-Conversation-Id": talk}
            asking = asyncio.ensure_future(w.client.post(f"{w.url}/v1/completions", json=body, headers=headers))
            await eventually(partial(was_asked, policy))
            begun, _ = await asyncio.wait([asking], timeout=0.1 if buffered else 5.0)
            assert bool(begun) is not buffered  # the first token is out; has anything of it been sent on?
            policy.hold.set()
            async with await asking as response:
                assert (await response.read()).endswith(b"[DONE]\n\n")


async def test_a_tripped_stand_in_is_counted_as_served_but_not_as_a_sample_of_stable(tmp_path: Path) -> None:
    async with world() as w:
        await w.configure(**HALF, fallback_on_safety_hit=True, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = w.stable.text = "a secret"
        await w.ask(ON_CANARY[0])
        row = counts_of(await w.pull(), "stable")
        assert (row.requests, row.violations, row.harmful_served) == (0, 0, 1)


async def test_without_a_filter_nothing_is_judged() -> None:
    async with world() as w:
        await w.configure(**HALF)
        await w.ask(ON_CANARY[0])
        row = counts_of(await w.pull(), "canary")
        assert (row.conversations, row.judged, row.judged_conversations) == (1, 0, 0)
        assert (await w.state()).safety_filter is None


async def test_shadow_pairs_ask_the_canary_too_and_drop_its_answer(tmp_path: Path) -> None:
    async with world() as w:
        await w.configure(stage=0, shadow=True, safety_filter=secret_filter(tmp_path))
        await eventually(lambda: w.gateway.state.safety.digest)
        w.canary.text = "a secret"
        response = await w.ask("c")
        assert response.headers["X-RLHF-Arm"] == "stable"
        await eventually(lambda: len(w.gateway.ledger.snapshot(0).counts) == 2)
        assert w.canary.calls[0]["body"] == w.stable.calls[0]["body"]
        row = counts_of(await w.pull(), "canary", shadow=True, stage=0)
        assert (row.conversations, row.violating_conversations, row.harmful_served) == (1, 1, 0)


async def test_a_refusal_that_stable_does_not_share_is_a_failure_in_the_shadow_too() -> None:
    async with world() as w:
        await w.configure(stage=0, shadow=True)

        def shadowed() -> ArmCounts:
            return counts_of(w.gateway.ledger.snapshot(0), "canary", shadow=True, stage=0)

        w.canary.status = 400
        assert (await w.ask("c0")).status == 200
        await eventually(lambda: shadowed().requests == 1)
        assert (shadowed().failures, shadowed().failed_conversations) == (1, 1)
        w.stable.status = 400
        assert (await w.ask("c1")).status == 400
        await eventually(lambda: shadowed().requests == 2)
        assert shadowed().failures == 1  # the second was the user's own mistake


@pytest.mark.parametrize("shadow", [False, True])
async def test_a_user_who_leaves_stables_stream_does_not_take_the_canarys_refusal_along(shadow: bool) -> None:
    """Clients close a stream when they have read enough of it; that stable answers was known by then."""
    async with world() as w:
        await w.configure(**({"shadow": True} if shadow else HALF))

        def refused() -> ArmCounts:
            return counts_of(w.gateway.ledger.snapshot(0), "canary", shadow=shadow)

        w.canary.status, w.stable.hold = 400, asyncio.Event()
        body, headers = {"prompt": "x", "stream": True}, {"X-Conversation-Id": ON_CANARY[0]}
        url = f"{w.url}/v1/completions"
        async with aiohttp.ClientSession() as user, user.post(url, json=body, headers=headers) as response:
            assert response.status == 200
            await response.content.readline()
            await eventually(lambda: w.canary.calls)
        await eventually(lambda: refused().requests == 1)
        assert (refused().failures, refused().failed_conversations) == (1, 1)


async def test_a_hanging_canary_costs_pairs_not_answers() -> None:
    async with world(shadow_limit=2) as w:
        await w.configure(stage=0, shadow=True)
        w.canary.hold = asyncio.Event()
        for number in range(5):
            assert (await w.ask(f"c{number}")).status == 200
        assert w.gateway.state.flights.counts() == {"rev-canary": 2}
        w.canary.hold.set()
        await eventually(lambda: len(w.gateway.ledger.snapshot(0).counts) == 2)
        await eventually(lambda: not w.gateway.state.flights.counts())
        assert counts_of(await w.pull(), "canary", shadow=True, stage=0).requests == 2
        async with w.client.get(f"http://127.0.0.1:{w.gateway.ports['metrics']}/metrics") as response:
            text = await response.text()
        assert (
            'rlhf_gateway_shadow_dropped_total{arm="shadow",revision="rev-canary",rollout="desk",stage="0"} 3.0' in text
        )


async def test_a_stage_that_was_interrupted_goes_on_being_counted_however_many_came_meanwhile() -> None:
    """A candidate without a pod gets no traffic; that of stable meanwhile is no evidence, and took the memory."""
    async with world(max_conversations=8) as w:
        await w.configure(**HALF)
        await w.ask(ON_CANARY[0])
        await w.configure(canary=None, salt="uid+hold", stage=99)
        for number in range(20):
            await w.ask(f"meanwhile-{number}")
        await w.configure(**HALF)
        for talk in ON_CANARY:
            await w.ask(talk)
        assert counts_of(await w.pull(), "canary").conversations == len(ON_CANARY)


async def test_a_dead_canary_is_ejected_at_once_and_comes_back_by_probe() -> None:
    async with world() as w:
        await w.configure(**HALF)
        port = int(w.canary.url.rsplit(":", 1)[1])
        await w.canary.die()
        response = await w.ask(ON_CANARY[0])
        assert (response.status, response.headers["X-RLHF-Arm"]) == (200, "stable")
        assert (await w.state()).ejected == ("rev-canary",)
        response = await w.ask(ON_CANARY[1])
        assert response.headers["X-RLHF-Fallback"] == "ejected"
        row = counts_of(await w.pull(), "canary")
        assert row.failures + row.diverted == 2
        async with serving(w.canary.application(), port):
            await eventually(lambda: not w.gateway.state.health.all_ejected())
            assert (await w.ask(ON_CANARY[2])).headers["X-RLHF-Arm"] == "canary"


async def test_while_the_canary_is_ejected_neither_arm_gathers_evidence() -> None:
    """Of 1,000 conversations at 10 % during an outage of seconds 900 were counted, all stable's: a wrong split."""
    async with world() as w:
        await w.configure(**HALF)
        for talk in (ON_CANARY[0], ON_STABLE[0]):
            await w.ask(talk)
        port = int(w.canary.url.rsplit(":", 1)[1])
        await w.canary.die()
        await eventually(lambda: w.gateway.state.health.ejected("rev-canary"))
        for talk in (*ON_CANARY[1:4], *ON_STABLE[1:4]):
            assert (await w.ask(talk)).headers["X-RLHF-Arm"] == "stable"
        evidence = await w.pull()
        canary, stable = counts_of(evidence, "canary"), counts_of(evidence, "stable")
        assert (canary.conversations, stable.conversations) == (1, 1)
        assert (canary.diverted, stable.requests) == (3, 4)  # users' requests are counted all the same
        async with serving(w.canary.application(), port):
            await eventually(lambda: not w.gateway.state.health.all_ejected())
            for talk in (*ON_CANARY, *ON_STABLE):
                await w.ask(talk)
            evidence = await w.pull()
            assert counts_of(evidence, "canary").conversations == counts_of(evidence, "stable").conversations == 5


async def test_an_idle_dead_canary_is_found_by_probes() -> None:
    async with world() as w:
        await w.configure(**HALF)
        await w.canary.die()
        await eventually(lambda: w.gateway.state.health.ejected("rev-canary"))
        assert (await w.ask(ON_CANARY[0])).headers["X-RLHF-Fallback"] == "ejected"
        row = counts_of(await w.pull(), "canary")
        assert (row.diverted, row.requests, row.failures) == (1, 0, 0)


async def test_stable_is_never_replaced_by_the_canary() -> None:
    async with world() as w:
        await w.configure(**HALF)
        await w.stable.die()
        await eventually(lambda: w.gateway.state.health.ejected("rev-stable"))
        assert (await w.ask(ON_STABLE[0])).status == 502
        assert w.canary.calls == []


async def test_users_wait_for_a_stable_whose_service_has_no_pod_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """As right after a rollout was created: its pods are ready a moment before every node routes to them."""
    tries: list[str] = []
    plain = Upstream._send_once

    async def counted(self: Upstream, backend: Backend, question: Question) -> aiohttp.ClientResponse:
        tries.append(backend.revision)
        return await plain(self, backend, question)

    monkeypatch.setattr(Upstream, "_send_once", counted)
    async with world() as w:
        await w.configure(canary=None)
        port = int(w.stable.url.rsplit(":", 1)[1])
        await w.stable.die()
        asking = asyncio.ensure_future(w.ask("c"))
        await eventually(lambda: len(tries) > 2)
        async with serving(w.stable.application(), port):
            assert (await asking).status == 200
        assert counts_of(await w.pull(), "stable").failures == 0


async def test_patience_with_stable_ends_and_a_canary_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    async def refused(_self: Upstream, backend: Backend, _question: Question) -> aiohttp.ClientResponse:
        tries.append(backend.revision)
        raise UpstreamError("refused" if backend.revision == "rev-stable" else "disconnected", "gone")

    monkeypatch.setattr(Upstream, "_send_once", refused)
    async with world() as w:
        await w.configure(**HALF)
        assert (await w.ask(ON_CANARY[0])).status == 502  # neither it nor its stand-in
        assert tries == ["rev-canary"] * 2 + ["rev-stable"] * 6


async def test_records_name_no_words_and_no_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    async with world(record_share=1.0) as w:
        await w.configure(**HALF)
        await w.ask(ON_CANARY[0])
        (line,) = capsys.readouterr().out.splitlines()
        record = json.loads(line)
        assert (record["arm"], record["served_by"], record["unit"]) == ("canary", "rev-canary", "header")
        assert ON_CANARY[0] not in line
        assert "thank" not in line
