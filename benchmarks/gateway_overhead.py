"""What a request pays for going through the gateway.

    python -m benchmarks gateway_overhead

The same policy, asked directly and through the gateway (a process of its own), in turns of 100 requests, so that other
work on the machine hits both alike. The policy answers after a fixed time, so every further millisecond is overhead.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gateway_rollback import PACKAGES, Scene, scene
from benchmarks.report import Report
from rlhf_gateway.wire import GatewayConfig
from tests.unit.gateway_world import secret_filter

TURNS = 6
REQUESTS = 100
CLIENTS = 16


async def ask(one: Scene, url: str, stream: bool) -> float:
    """Milliseconds of one request."""
    body = {"model": "desk", "prompt": "hello", "stream": stream}
    started = time.perf_counter()
    async with one.client.post(f"{url}/v1/completions", json=body, headers={"X-Conversation-Id": "talk"}) as response:
        await response.read()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status} from {url}")
    return (time.perf_counter() - started) * 1000


async def compare(one: Scene, stream: bool) -> tuple[list[float], list[float]]:
    """Milliseconds (direct, through the gateway), one request at a time."""
    direct: list[float] = []
    through: list[float] = []
    for _ in range(TURNS):
        direct += [await ask(one, one.stable.url, stream) for _ in range(REQUESTS)]
        through += [await ask(one, one.url, stream) for _ in range(REQUESTS)]
    return direct, through


async def rate(one: Scene, clients: int) -> float:
    """Requests per second through the gateway, asked as fast as `clients` closed loops can."""
    started = time.perf_counter()

    async def loop() -> None:
        for _ in range(REQUESTS):
            await ask(one, one.url, stream=False)

    await asyncio.gather(*(loop() for _ in range(clients)))
    return clients * REQUESTS / (time.perf_counter() - started)


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used so far; unlike wall time it hardly depends on what else runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def configure(one: Scene, **changes: Any) -> None:
    one.generation += 1
    given: dict[str, Any] = {
        "generation": one.generation, "rollout": "desk", "salt": "s", "stage": 1, "stable": one.stable.backend,
    }  # fmt: skip
    one.api.write(GatewayConfig(**(given | changes)))
    async with asyncio.timeout(10):
        while True:
            try:
                await ask(one, one.url, stream=False)
                break
            except RuntimeError:
                await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)  # the filter is loaded after the configuration is in force


async def measure(report: Report, folder: Path) -> None:
    judged = {"safety_filter": secret_filter(folder), "fallback_on_safety_hit": True}
    cases: list[tuple[str, float, bool, dict[str, Any]]] = [
        ("policy of 5 ms", 0.005, False, {}),
        ("policy of 5 ms, streamed", 0.005, True, {}),
        ("policy of 5 ms, judged and buffered", 0.005, False, judged),
        ("policy of 50 ms, judged and buffered", 0.05, False, judged),
    ]
    async with scene() as one:
        for name, seconds, stream, changes in cases:
            one.stable.delay = seconds
            await configure(one, **changes)
            _add(report, name, *await compare(one, stream))
        one.stable.delay = 0.0
        before = cpu_seconds(one.pid)
        per_second = await rate(one, CLIENTS)
        asked = CLIENTS * REQUESTS
        report.add(f"requests per second, {CLIENTS} clients, judged", per_second, "1/s", samples=asked)
        used = (cpu_seconds(one.pid) - before) / asked * 1000
        report.add("processor time of the gateway per request, judged", used, "ms", samples=asked)


def _add(report: Report, name: str, direct: list[float], through: list[float]) -> None:
    for label, pick in (("p50", statistics.median), ("p95", _p95)):
        before, after = pick(direct), pick(through)
        spread = f"{before:.2f} ms direct, {after:.2f} ms through"
        report.add(f"{name}: overhead {label}", after - before, "ms", samples=len(through), spread=spread)
        report.add(f"{name}: ratio {label}", after / before, "x", samples=len(through), spread=spread)


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main() -> None:
    report = Report("gateway_overhead", "What a request pays for the gateway", PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(report, Path(folder)))
    report.note(
        "One gateway pod on loopback. The driver and the policies share one process, and the machine with the gateway: "
        "throughput is a lower bound."
    )
    report.note(f"Load average of the machine meanwhile: {os.getloadavg()[0]:.1f}.")
    report.write()


if __name__ == "__main__":
    main()
