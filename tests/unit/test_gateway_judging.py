"""Answers before the safety filter: tripped, broken off, left, and every channel of them."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlhf_gateway.openai import answers
from rlhf_trainer.safety.scorer import LinearFilter
from tests.unit.gateway_world import FakePolicy, counts_of, eventually, secret_filter, talks_on, world

HALF = {"canary_weight_percent": 50.0}
ON_CANARY = talks_on("canary", 50.0, 5)
ON_STABLE = talks_on("stable", 50.0, 5)


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
