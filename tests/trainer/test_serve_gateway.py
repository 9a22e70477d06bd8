"""The gateway in front of real policy servers: real tokens, streamed, while the weights move."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from rlhf_gateway.traffic import Plan, Traffic
from rlhf_gateway.wire import Backend
from tests.trainer.serve_world import serving, write_policy
from tests.unit.gateway_world import world

PROMPTS = ("hello my parcel is late be warm", "hi my login is broken be blunt")


async def test_real_tokens_through_a_promotion_without_a_failed_request(tmp_path: Path) -> None:
    stable, canary = write_policy(tmp_path / "stable", seed=0), write_policy(tmp_path / "canary", seed=1)
    async with world() as w, serving(stable) as (stable_url, _, _), serving(canary) as (canary_url, _, _):
        arms = {
            "stable": Backend(revision="r1", digest="sha256:" + "1" * 64, url=stable_url),
            "canary": Backend(revision="r2", digest="sha256:" + "2" * 64, url=canary_url),
        }
        await w.configure(**arms, canary_weight_percent=0.0)
        traffic = Traffic(Plan(w.url, PROMPTS, 10.0, 10_000, 6.0, max_tokens=20, stream=True), io.StringIO())
        sending = asyncio.create_task(traffic.run())
        for weight in (10.0, 50.0, 100.0):
            await asyncio.sleep(1.0)
            await w.configure(**arms, canary_weight_percent=weight)
        await asyncio.sleep(1.0)
        await w.configure(stable=arms["canary"], canary=None)
        await sending
        assert [line for line in traffic.lines if not line.ok] == []
        assert {line.revision for line in traffic.lines} == {"r1", "r2"}
        assert len({line.text for line in traffic.lines}) > 20  # real draws of real policies
        assert traffic.lines[-1].revision == "r2"
        assert traffic.lines[-1].arm == "stable"
