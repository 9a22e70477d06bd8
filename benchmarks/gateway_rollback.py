"""How long a rollback takes to reach users: from the write of weight 0 to the first answer by stable.

    python -m benchmarks gateway_rollback

The gateway is a process of its own; a fake API server delivers the watch event, so that etcd and kube-apiserver are not
part of the figure. One conversation on the canary asks in a closed loop, over background traffic of other
conversations; every answer takes the policy 5 ms. Each run raises the weight to 50 %, waits until the canary answers,
and writes 0.
"""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from benchmarks.report import Report
from rlhf_gateway.__main__ import run
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings
from rlhf_gateway.traffic import Plan, Traffic
from rlhf_gateway.wire import ADMIN_PORT, ARM_HEADER, GatewayConfig
from tests.unit.gateway_world import FakeApi, FakePolicy, eventually, serving, talks_on

RUNS = 50
WARM_UP_RUNS = 5
BACKGROUND_RATE = 50.0
POLICY_SECONDS = 0.005
TRAFFIC, ADMIN, METRICS = 18000, 10000 + ADMIN_PORT, 19090
PACKAGES = ("aiohttp", "pydantic")


@dataclass(frozen=True)
class Rollback:
    """Seconds from the write to the first answer by stable, and canary answers to questions asked after the write."""

    seconds: float
    late: int


@dataclass
class Scene:
    api: FakeApi
    stable: FakePolicy
    canary: FakePolicy
    client: aiohttp.ClientSession
    url: str
    pid: int  # of the gateway
    generation: int = 0

    def write(self, weight: float) -> float:
        """Write a weight; the moment it was written."""
        self.generation += 1
        config = GatewayConfig(
            generation=self.generation, rollout="desk", salt="uid+digest", stage=1, stable=self.stable.backend,
            canary=self.canary.backend, canary_weight_percent=weight,
        )  # fmt: skip
        moment = time.perf_counter()
        self.api.write(config)
        return moment

    async def arm(self, talk: str) -> str:
        body = {"model": "desk", "prompt": "hello"}
        headers = {"X-Conversation-Id": talk}
        async with self.client.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
            await response.read()
            return response.headers.get(ARM_HEADER, "none")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """A gateway process between a fake API server and two policies."""
    api = FakeApi()
    stable, canary = (FakePolicy(name, delay=POLICY_SECONDS) for name in ("rev-stable", "rev-canary"))
    async with (
        serving(api.application()) as (api_url, _),
        serving(stable.application()) as (stable.url, _),
        serving(canary.application()) as (canary.url, _),
        aiohttp.ClientSession() as client,
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.gateway_rollback", api_url, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await eventually(lambda: api.watched, seconds=60)
            yield Scene(api, stable, canary, client, f"http://127.0.0.1:{TRAFFIC}", process.pid)
        finally:
            process.terminate()
            await process.wait()


async def gateway(api_url: str) -> None:
    """The other process."""
    settings = Settings(
        rollout="desk", namespace="ns", config_map="gw", api=ApiServer(api_url), host="127.0.0.1",
        traffic_port=TRAFFIC, admin_port=ADMIN, metrics_port=METRICS,
        drain_accept_seconds=0.0, drain_evidence_seconds=0.0,
    )  # fmt: skip
    await run(settings)


async def roll_back(one: Scene, talk: str) -> Rollback:
    one.write(50.0)
    async with asyncio.timeout(10):
        while await one.arm(talk) != "canary":
            pass
    written = one.write(0.0)
    late = 0
    while await one.arm(talk) != "stable":
        late += 1
    return Rollback(time.perf_counter() - written, late)


async def measure() -> list[Rollback]:
    async with scene() as one:
        one.write(0.0)
        background = Traffic(Plan(one.url, ("hello",), BACKGROUND_RATE, 100_000, 600.0, model="desk"), io.StringIO())
        sending = asyncio.create_task(background.run())
        (talk,) = talks_on("canary", 50.0, 1)
        runs = [await roll_back(one, talk) for _ in range(RUNS + WARM_UP_RUNS)]
        background.stop()
        await sending
        failed = sum(not line.ok for line in background.lines)
        if failed:
            raise RuntimeError(f"{failed} of {len(background.lines)} background requests failed")
        return runs[WARM_UP_RUNS:]


def main() -> None:
    if len(sys.argv) > 1:
        asyncio.run(gateway(sys.argv[1]))
        return
    runs = asyncio.run(measure())
    times = sorted(one.seconds * 1000 for one in runs)
    report = Report("gateway_rollback", "Rollback: from the written weight to users", PACKAGES)
    spread = f"{times[0]:.1f} to {times[-1]:.1f} ms"
    report.add(
        "write to first answer by stable, p50", statistics.median(times), "ms", samples=len(times), spread=spread
    )
    report.add(
        "write to first answer by stable, p99", times[int(0.99 * len(times))], "ms", samples=len(times), spread=spread
    )
    late = sum(one.late for one in runs)
    report.add("canary answers to questions asked after the write", late / len(runs), "per run", samples=len(runs))
    report.note(
        f"One pod, loopback, {BACKGROUND_RATE:.0f} other requests per second, policies that answer in "
        f"{POLICY_SECONDS * 1000:.0f} ms. The answer's own time is part of the figure; etcd and kube-apiserver "
        "are not. With 50 runs the p99 is the worst one."
    )
    report.note(f"Load average of the machine meanwhile: {os.getloadavg()[0]:.1f}.")
    report.write()


if __name__ == "__main__":
    main()
