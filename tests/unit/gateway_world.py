"""A gateway on loopback between a small fake API server and fake policies with fault knobs."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from rlhf_gateway.app import Gateway
from rlhf_gateway.assignment import arm_of
from rlhf_gateway.kube import ApiServer
from rlhf_gateway.settings import Settings
from rlhf_gateway.wire import Arm, ArmCounts, Backend, DataPlaneState, Evidence, GatewayConfig, SafetyFilter
from rlhf_trainer.digests import file_digest
from rlhf_trainer.safety.scorer import LinearFilter

OPERATOR = "system:serviceaccount:rlhf-system:rlhf-operator"
TOKENS = {"operator-token": OPERATOR, "other-token": "system:serviceaccount:default:someone"}


async def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait for a condition; fail with a timeout when it never holds."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    app: web.Application, port: int = 0, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[str, web.AppRunner]]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    try:
        yield f"http://{host}:{runner.addresses[0][1]}", runner
    finally:
        await runner.cleanup()


@dataclass
class FakeApi:
    """List and watch of one ConfigMap, and TokenReview."""

    version: int = 1
    config_map: dict[str, Any] | None = None
    gone: bool = False  # answer the next watch with 410
    down: bool = False
    lists: int = 0
    reviews: int = 0
    _watchers: list[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=list)

    def put(self, text: str, kind: str = "MODIFIED") -> None:
        self.version += 1
        self.config_map = {
            "metadata": {"name": "gw", "resourceVersion": str(self.version)},
            "data": {"gateway.json": text},
        }
        self.send({"type": kind, "object": self.config_map})

    def write(self, config: GatewayConfig) -> None:
        self.put(config.to_json())

    def send(self, event: dict[str, Any] | None) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(event)

    @property
    def watched(self) -> bool:
        return bool(self._watchers)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/configmaps", self._config_maps)
        app.router.add_post("/apis/authentication.k8s.io/v1/tokenreviews", self._review)
        return app

    async def _config_maps(self, request: web.Request) -> web.StreamResponse:
        assert request.query["fieldSelector"] == "metadata.name=gw"
        if self.down:
            return web.Response(status=500, text="down")
        if request.query.get("watch") != "true":
            self.lists += 1
            items = [self.config_map] if self.config_map else []
            return web.json_response({"items": items, "metadata": {"resourceVersion": str(self.version)}})
        response = web.StreamResponse()
        await response.prepare(request)
        if self.gone:
            self.gone = False
            error = {"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}
            await response.write(json.dumps(error).encode() + b"\n")
            return response
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._watchers.append(queue)
        if self.config_map is not None and int(request.query["resourceVersion"]) < self.version:
            queue.put_nowait({"type": "MODIFIED", "object": self.config_map})  # what happened since that version
        try:
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self._watchers.remove(queue)
        return response

    async def _review(self, request: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=500, text="down")
        self.reviews += 1
        spec = (await request.json())["spec"]
        username = TOKENS.get(spec["token"])
        known = {"authenticated": True, "user": {"username": username}, "audiences": spec["audiences"]}
        status = known if username else {"authenticated": False}
        return web.json_response({"status": status}, status=201)


@dataclass
class FakePolicy:
    """An OpenAI-shaped backend that misbehaves on request."""

    revision: str
    text: str = "thank you for asking"
    status: int = 200
    delay: float = 0.0
    break_after: int | None = None  # chunks of a stream, then the connection is cut; -1: cut before any header
    compress: bool = False  # answers, although nobody asked for it
    hold: asyncio.Event | None = None  # answers wait for it (after the first chunk, in a stream)
    calls: list[dict[str, Any]] = field(default_factory=list)
    healthy: bool = True
    url: str = ""
    runner: web.AppRunner | None = None

    @property
    def backend(self) -> Backend:
        return Backend(revision=self.revision, digest="sha256:" + "0" * 64, url=self.url)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{tail:.*}", self._answer)
        return app

    async def die(self) -> None:
        assert self.runner is not None
        await self.runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "desk"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append({"body": body, "headers": dict(request.headers)})
        if self.break_after == -1:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(self.delay)
        if self.status >= 300:
            return web.json_response({"error": {"message": "injected"}}, status=self.status)
        if body.get("stream"):
            return await self._stream(request)
        if self.hold is not None:
            await self.hold.wait()
        answer = web.json_response({"choices": [{"index": 0, "text": self.text}], "model": "desk"})
        if self.compress:
            answer.enable_compression(web.ContentCoding.gzip)
        return answer

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.compress:
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        for number, word in enumerate(self.text.split(" ")):
            if self.break_after == number:
                assert request.transport is not None
                request.transport.abort()
                return response
            document = {"choices": [{"index": 0, "text": f" {word}"}]}
            await response.write(b"data: " + json.dumps(document).encode() + b"\n\n")
            if number == 0 and self.hold is not None:
                await self.hold.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass
class World:
    api: FakeApi
    stable: FakePolicy
    canary: FakePolicy
    gateway: Gateway
    client: aiohttp.ClientSession
    generation: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.ports['traffic']}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.gateway.ports['admin']}"

    async def configure(self, **changes: Any) -> GatewayConfig:
        """Write a configuration and wait until it is in force."""
        self.generation += 1
        given: dict[str, Any] = {
            "generation": self.generation, "rollout": "desk", "salt": "uid+digest", "stage": 1,
            "stable": self.stable.backend, "canary": self.canary.backend,
        }  # fmt: skip
        config = GatewayConfig(**(given | changes))
        self.api.write(config)
        await eventually(lambda: self.gateway.state.generation == config.generation)
        return config

    async def ask(self, conversation: str | None = None, stream: bool = False) -> aiohttp.ClientResponse:
        headers = {"X-Conversation-Id": conversation} if conversation else {}
        body = {"model": "desk", "prompt": "hello", "stream": stream}
        response = await self.client.post(f"{self.url}/v1/completions", json=body, headers=headers)
        await response.read()
        return response

    async def pull(self, token: str = "operator-token") -> Evidence:
        async with self.client.get(f"{self.admin}/evidence", headers={"Authorization": f"Bearer {token}"}) as response:
            assert response.status == 200, await response.text()
            return Evidence.model_validate_json(await response.text())

    async def state(self) -> DataPlaneState:
        headers = {"Authorization": "Bearer operator-token"}
        async with self.client.get(f"{self.admin}/state", headers=headers) as response:
            return DataPlaneState.model_validate_json(await response.text())


def talks_on(arm: Arm, weight: float, count: int, salt: str = "uid+digest") -> list[str]:
    """Conversation names that the assignment puts on an arm at a weight."""
    names = (f"talk-{number}" for number in range(100_000))
    return [name for name in names if arm_of(salt, f"header:{name}", weight) == arm][:count]


def counts_of(evidence: Evidence, arm: Arm, shadow: bool = False, stage: int = 1) -> ArmCounts:
    """The one row of an arm in a stage; zeroes when there is none."""
    rows = [row for row in evidence.counts if (row.arm, row.shadow, row.stage) == (arm, shadow, stage)]
    assert len(rows) <= 1, rows
    return rows[0] if rows else ArmCounts(stage=stage, arm=arm, revision="none", shadow=shadow)


def secret_filter(folder: Path) -> SafetyFilter:
    """A filter artifact that trips on the word "secret" alone."""
    weights = np.zeros(4096, dtype=np.float32)
    weights[zlib.crc32(b"secre") % 4096] = 10.0
    path = folder / "filter.json"
    path.write_text(LinearFilter(weights, bias=-1.0, threshold=0.0).to_json())
    return SafetyFilter(path=str(path), digest=file_digest(path))


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    """Everything up, nothing configured yet."""
    api, stable, canary = FakeApi(), FakePolicy("rev-stable"), FakePolicy("rev-canary")
    async with (
        serving(api.application()) as (api_url, _),
        serving(stable.application()) as (stable.url, stable.runner),
        serving(canary.application()) as (canary.url, canary.runner),
        aiohttp.ClientSession() as client,
    ):
        given: dict[str, Any] = {
            "rollout": "desk", "namespace": "ns", "config_map": "gw", "api": ApiServer(api_url), "pod_uid": "pod-1",
            "host": "127.0.0.1", "traffic_port": 0, "admin_port": 0, "metrics_port": 0, "probe_seconds": 0.05,
            "drain_accept_seconds": 0.0, "drain_answer_seconds": 5.0, "drain_evidence_seconds": 5.0,
        }  # fmt: skip
        gateway = Gateway(Settings(**(given | settings)))
        try:
            await gateway.start()
            await eventually(lambda: api.watched)
            yield World(api, stable, canary, gateway, client)
        finally:
            await gateway.close()
