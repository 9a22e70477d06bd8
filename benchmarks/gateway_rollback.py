"""How long a rollback takes to reach users.

    python -m benchmarks gateway_rollback

One conversation on the canary asks in a closed loop, over background traffic of other conversations; every answer takes
the policy 5 ms. The gateway is a process of its own.

From the loss of the canary's endpoint, on a real etcd and kube-apiserver, with the operator and the gateway as they are
shipped: an EndpointSlice says that the endpoint is gone, the operator writes weight 0, the gateway takes it up. The
canary goes on answering meanwhile, else the gateway would turn to stable by itself and hide how long the route takes.

From a verdict, in the same place: the canary breaks its streamed answers off, the gateway counts the conversations that
this happens to, the operator pulls the counts at its interval, and the pull that makes the availability guardrail fail
is the moment of the verdict: when the gateway had that answer ready to send. Which one it was follows from the number
of conversations that the operator wrote down with the verdict. Each run is a new candidate. The time from the first
broken answer that a user got contains the wait for enough evidence and for the next pull.

From the write of weight 0 alone: a fake API server delivers the watch event, so that etcd and kube-apiserver are not
part of the figure. Each run raises the weight to 50 %, waits until the canary answers, and writes 0.
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

from benchmarks.harness.operator import bench
from benchmarks.harness.rollout import WEIGHT, Rollout, ask, rollout
from benchmarks.harness.verdict import BREAK_AFTER, Trials, Users, Verdict
from benchmarks.report import Report
from rlhf_gateway.__main__ import run
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings
from rlhf_gateway.traffic import Plan, Traffic
from rlhf_gateway.wire import ADMIN_PORT, GatewayConfig
from rlhf_operator.kinds.policy_rollout.route import TRIAL_SECONDS
from tests.unit.gateway_world import FakeApi, FakePolicy, eventually, serving, talks_on

RUNS = 50
WARM_UP_RUNS = 5
VERDICT_WARM_UP_RUNS = 2
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
        return await ask(self.client, self.url, talk)


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


@dataclass(frozen=True)
class Loss:
    """Seconds from the API server's answer to the endpoint's loss until weight 0 is seen, and stable answers."""

    written: float
    answered: float


async def lose_endpoint(one: Rollout, talk: str) -> Loss:
    await one.endpoint(one.canary, ready=True)
    await one.weight(WEIGHT)
    async with asyncio.timeout(10):
        await one.first_by("canary", talk)
    lost = await one.endpoint(one.canary, ready=False)
    asking = asyncio.create_task(one.first_by("stable", talk))
    written = await one.weight(0.0)
    return Loss(max(0.0, written - lost), await asking - lost)


async def losses() -> list[Loss]:
    async with bench() as made, rollout(made, POLICY_SECONDS) as one:
        background = Traffic(Plan(one.url, ("hello",), BACKGROUND_RATE, 100_000, 600.0, model="desk"), io.StringIO())
        sending = asyncio.create_task(background.run())
        talk = await _talk_on_canary(one)
        await one.endpoint(one.canary, ready=False)
        await one.weight(0.0)
        found = [await lose_endpoint(one, talk) for _ in range(RUNS + WARM_UP_RUNS)]
        background.stop()
        await sending
        if failed := sum(not line.ok for line in background.lines):
            raise RuntimeError(f"{failed} of {len(background.lines)} background requests failed")
        return found[WARM_UP_RUNS:]


async def verdicts() -> tuple[list[Verdict], str]:
    """And how the operator's pulls of evidence came, in words."""
    async with bench() as made, rollout(made, POLICY_SECONDS) as one:
        one.candidates.break_after = BREAK_AFTER
        users = Users()
        plan = Plan(one.url, ("hello",), BACKGROUND_RATE, 100_000, 900.0, model="desk", stream=True)
        background = Traffic(plan, users)
        sending = asyncio.create_task(background.run())
        trials = Trials(one, users)
        found = [await trials.condemn(number) for number in range(RUNS + VERDICT_WARM_UP_RUNS)]
        background.stop()
        await sending
        if users.failed:
            raise RuntimeError(f"{len(users.failed)} requests failed without the canary: {users.failed[0]}")
        pulls = "every candidate fell at the first pull after its start"
        if trials.gaps:  # some took several
            pulls = f"here every {statistics.mean(trials.gaps):.2f} s on average"
        return found[VERDICT_WARM_UP_RUNS:], pulls


async def _talk_on_canary(one: Rollout) -> str:
    """A conversation that the operator's salt sends to the canary."""
    for number in range(100):
        if await ask(one.client, one.url, talk := f"talk-{number}") == "canary":
            return talk
    raise RuntimeError(f"no conversation in 100 goes to the canary at {WEIGHT:g} %")


def _add(report: Report, what: str, seconds: list[float]) -> None:
    times = sorted(second * 1000 for second in seconds)
    spread = f"{times[0]:.1f} to {times[-1]:.1f} ms"
    report.add(f"{what}, p50", statistics.median(times), "ms", samples=len(times), spread=spread)
    report.add(f"{what}, p99", times[int(0.99 * len(times))], "ms", samples=len(times), spread=spread)


def _counts(report: Report, what: str, counts: list[int]) -> None:
    spread = f"{min(counts)} to {max(counts)}"
    report.add(f"{what}, p50", statistics.median(counts), "per run", samples=len(counts), spread=spread)


def main() -> None:
    if len(sys.argv) > 1:
        asyncio.run(gateway(sys.argv[1]))
        return
    lost = asyncio.run(losses())
    judged, pulls = asyncio.run(verdicts())
    runs = asyncio.run(measure())
    report = Report("gateway_rollback", "Rollback: until users are answered by stable alone", PACKAGES)
    _add(report, "endpoint loss to weight 0 written", [one.written for one in lost])
    _add(report, "endpoint loss to first answer by stable", [one.answered for one in lost])
    _add(report, "verdict to weight 0 written", [one.written for one in judged])
    _add(report, "verdict to first answer by stable", [one.answered for one in judged])
    _add(report, "first broken answer of a user to weight 0 written", [one.harmed for one in judged])
    _counts(report, "broken answers that users got of a candidate", [one.broken for one in judged])
    _counts(report, "candidate conversations in the evidence of the verdict", [one.conversations for one in judged])
    _add(report, "write of weight 0 to first answer by stable", [one.seconds for one in runs])
    late = sum(one.late for one in runs)
    report.add("canary answers to questions asked after the write", late / len(runs), "per run", samples=len(runs))
    report.note(
        f"One pod, loopback, {BACKGROUND_RATE:.0f} other requests per second, policies that answer in "
        f"{POLICY_SECONDS * 1000:.0f} ms. The answer's own time is part of the figure; etcd and kube-apiserver "
        "are part of all figures but those from a write. With 50 runs the p99 is the worst one."
    )
    report.note(
        f"A verdict is the moment at which the gateway answered the pull of evidence that makes a guardrail fail. The "
        f"operator pulls every {TRIAL_SECONDS:g} s ± 10 % while a candidate is tried ({pulls}), "
        f"as shipped; the time from the first broken answer includes that wait, and that for enough "
        f"conversations. Half of the conversations go to the candidate, which breaks every streamed answer off; "
        f"guardrail availability, margin 0.05, alpha 0.01."
    )
    report.note(f"Load average of the machine meanwhile: {os.getloadavg()[0]:.1f}.")
    report.write()


if __name__ == "__main__":
    main()
