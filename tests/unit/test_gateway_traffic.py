"""Traffic under changing weights: no request fails, shares are as written, and the generator tells the truth."""

from __future__ import annotations

import asyncio
import io
import json
import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlhf_gateway.traffic import Line, Plan, Traffic, main, read_prompts, summary
from tests.unit.gateway_world import FakePolicy, World, counts_of, eventually, serving, world


async def send(w: World, **changes: Any) -> tuple[Traffic, io.StringIO]:
    out = io.StringIO()
    given: dict[str, Any] = {
        "url": w.url,
        "prompts": ("hello",),
        "rate": 150.0,
        "conversations": 10_000,
        "duration": 2.0,
    }
    traffic = Traffic(Plan(**(given | changes)), out)
    await traffic.run()
    return traffic, out


async def test_weights_change_under_traffic_without_a_failed_request() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=0.0)
        sending = asyncio.create_task(send(w, stream=True))
        for stage, weight in enumerate((5.0, 25.0, 50.0, 100.0, 10.0, 0.0), start=1):
            await asyncio.sleep(0.25)
            await w.configure(canary_weight_percent=weight, stage=stage)
        promoted = await w.configure(stable=w.canary.backend, canary=None, stage=9)
        traffic, _ = await sending
        assert promoted.generation == 8
        assert [line for line in traffic.lines if not line.ok] == []
        assert {line.arm for line in traffic.lines} == {"stable", "canary"}
        evidence = await w.pull()
        assert sum(row.failures for row in evidence.counts) == 0
        assert sum(row.requests + row.diverted for row in evidence.counts) == len(traffic.lines)


async def test_a_conversation_never_leaves_the_canary_while_the_weight_grows() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=5.0)
        sending = asyncio.create_task(send(w, conversations=60))
        for weight in (20.0, 40.0, 60.0):
            await asyncio.sleep(0.4)
            await w.configure(canary_weight_percent=weight)
        traffic, _ = await sending
        moved_to: dict[str, str] = {}
        for line in traffic.lines:
            if moved_to.get(line.conversation) == "canary":
                assert line.arm == "canary"
            moved_to[line.conversation] = str(line.arm)
        assert set(moved_to.values()) == {"stable", "canary"}


async def test_the_observed_share_is_the_weight_in_force() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=20.0)
        traffic, _ = await send(w, conversations=10**9, rate=200.0)
        n = len(traffic.lines)
        on_canary = sum(line.arm == "canary" for line in traffic.lines)
        assert n == 400
        assert abs(on_canary - 0.2 * n) < 4.5 * math.sqrt(0.2 * 0.8 * n)
        assert counts_of(await w.pull(), "canary").conversations == on_canary


POLICY = """
import asyncio
from tests.unit.gateway_world import FakePolicy, serving

async def main():
    async with serving(FakePolicy("rev-canary", delay=0.02).application()) as (url, _):
        print(url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def policy_process() -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", POLICY, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip(), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_canary_killed_mid_traffic_costs_only_streams_already_begun(stream: bool) -> None:
    async with world() as w, policy_process() as (url, process):
        canary = w.canary.backend.model_copy(update={"url": url})
        await w.configure(canary=canary, canary_weight_percent=50.0)
        traffic = Traffic(Plan(w.url, ("hello",), 100.0, 10_000, 60.0, stream=stream), io.StringIO())
        running = asyncio.create_task(traffic.run())
        await eventually(lambda: sum(line.arm == "canary" for line in traffic.lines) >= 20)
        begun = w.gateway.state.flights.counts().get("rev-canary", 0)
        process.kill()
        await eventually(lambda: sum(line.fallback == "ejected" for line in traffic.lines) >= 30, seconds=20)
        traffic.stop()
        await running
        failed = [line for line in traffic.lines if not line.ok]
        assert all(line.error == "the stream broke off" for line in failed)
        assert len(failed) <= (begun + 5 if stream else 0)  # what was being streamed when the process died
        row = counts_of(await w.pull(), "canary")
        assert row.failures >= len(failed)
        assert row.diverted == sum(line.fallback == "ejected" for line in traffic.lines)


async def test_the_model_is_asked_for_by_the_name_the_server_lists() -> None:
    async with world() as w:
        await w.configure()
        traffic, out = await send(w, duration=0.05)
        assert w.stable.calls[0]["body"]["model"] == "desk"
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert lines[0]["text"] == "thank you for asking"
        assert set(lines[0]) == set(Line.__dataclass_fields__)
        assert len(lines) == len(traffic.lines)


async def test_failures_are_reported_as_failures() -> None:
    policy = FakePolicy("rev", status=500)
    async with serving(policy.application()) as (url, _), aiohttp.ClientSession():
        traffic = Traffic(Plan(url, ("x",), 100.0, 5, 0.1, model="desk"), io.StringIO())
        await traffic.run()
        told = summary(traffic.lines)
        assert (told["requests"], told["failed"]) == (10, 10)
        assert told["latency_ms"]["p50"] is None
        assert {line.status for line in traffic.lines} == {500}


async def test_it_stops_when_told_and_waits_for_what_is_in_flight() -> None:
    policy = FakePolicy("rev", delay=0.1)
    async with serving(policy.application()) as (url, _):
        traffic = Traffic(Plan(url, ("x",), 50.0, 5, 60.0, model="desk"), io.StringIO())
        running = asyncio.create_task(traffic.run())
        await eventually(lambda: len(policy.calls) >= 3)
        traffic.stop()
        await asyncio.wait_for(running, 2)
        assert len(traffic.lines) == len(policy.calls)
        assert all(line.ok for line in traffic.lines)


def test_latency_counts_from_the_moment_a_request_was_due() -> None:
    lines = [Line(0.0, "c", 200, "stable", "rev", None, float(ms), "p", "t") for ms in range(1, 101)]
    assert summary(lines)["latency_ms"] == {"p50": 51.0, "p95": 96.0, "p99": 100.0}


def test_prompts_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": 3}\n')
    assert read_prompts(path) == ("a", "b")
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: each line must be an object with a `prompt`"):
        read_prompts(path)


@pytest.mark.parametrize("change", [{"rate": "0"}, {"conversations": "0"}, {"duration": "-1"}])
def test_a_senseless_plan_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    options = {"url": "http://127.0.0.1:1", "rate": "1", "conversations": "1", "duration": "1", "prompts": str(path)}
    options |= {"out": str(tmp_path / "out")} | change
    assert main([argument for name, value in options.items() for argument in (f"--{name}", value)]) == 2
    assert "must be positive" in capsys.readouterr().err
