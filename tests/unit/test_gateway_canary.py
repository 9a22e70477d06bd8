"""Mirrored questions, and a canary that is dead: what is counted, and what users get meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from rlhf_gateway.wire import ArmCounts
from tests.unit.gateway_world import counts_of, eventually, secret_filter, serving, talks_on, world

HALF = {"canary_weight_percent": 50.0}
ON_CANARY = talks_on("canary", 50.0, 5)
ON_STABLE = talks_on("stable", 50.0, 5)


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
