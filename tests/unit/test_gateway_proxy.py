"""Requests through a real gateway: who answers, what is counted, and what users never see."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from rlhf_gateway.openai import answers
from rlhf_gateway.upstream import Limits, Question, Upstream, UpstreamError
from rlhf_gateway.wire import Backend
from tests.unit.gateway_world import counts_of, eventually, serving, talks_on, world

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
