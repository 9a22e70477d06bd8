"""The gateway as a process: it drains on SIGTERM, and says what is wrong with its environment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from rlhf_gateway.wire import Evidence, GatewayConfig
from tests.unit.gateway_world import FakeApi, FakePolicy, counts_of, eventually, serving

PROGRAM = """
import asyncio, sys
from rlhf_gateway.__main__ import run
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings

traffic, admin, metrics = (int(port) for port in sys.argv[2:5])
asyncio.run(run(Settings(
    rollout="desk", namespace="ns", config_map="gw", api=ApiServer(sys.argv[1]), host="127.0.0.1",
    traffic_port=traffic, admin_port=admin, metrics_port=metrics,
    drain_accept_seconds=0.2, drain_answer_seconds=20.0, drain_evidence_seconds=20.0,
)))
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@asynccontextmanager
async def process(api_url: str, ports: list[int]) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = [sys.executable, "-c", PROGRAM, api_url, *map(str, ports)]
    started = await asyncio.create_subprocess_exec(*arguments)
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def test_sigterm_under_load_loses_neither_the_answer_nor_the_count() -> None:
    api, stable = FakeApi(), FakePolicy("rev-stable", hold=asyncio.Event())
    traffic, admin, metrics = free_ports(3)
    async with (
        serving(api.application()) as (api_url, _),
        serving(stable.application()) as (stable.url, _),
        process(api_url, [traffic, admin, metrics]) as gateway,
        aiohttp.ClientSession() as client,
    ):
        await eventually(lambda: api.watched, seconds=60)
        api.write(GatewayConfig(generation=1, rollout="desk", salt="s", stage=1, stable=stable.backend))
        url = f"http://127.0.0.1:{traffic}/v1/completions"

        async def ask() -> tuple[int, bytes]:
            while True:
                async with client.post(url, json={"prompt": "x", "stream": True}) as response:
                    if response.status != 503:  # the configuration is not there yet
                        return response.status, await response.read()

        asking = asyncio.create_task(ask())
        await eventually(lambda: stable.calls, seconds=20)
        gateway.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)  # longer than it goes on accepting
        assert stable.hold is not None
        stable.hold.set()
        status, body = await asking
        assert (status, body.endswith(b"[DONE]\n\n")) == (200, True)
        headers = {"Authorization": "Bearer operator-token"}
        async with client.get(f"http://127.0.0.1:{admin}/evidence", headers=headers) as response:
            evidence = Evidence.model_validate_json(await response.text())
        assert counts_of(evidence, "stable").requests == 1
        assert await asyncio.wait_for(gateway.wait(), 20) == 0  # the last counts were pulled: nothing to wait for


async def test_a_wrong_environment_is_named() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ROLLOUT"}
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rlhf_gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await asyncio.wait_for(gateway.communicate(), 60)
    assert gateway.returncode == 1
    assert b"environment variable ROLLOUT is not set" in stderr
