"""The admin port: evidence and state for the operator, probes for the kubelet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from rlhf_gateway.auth import Guard
from rlhf_gateway.state import State

_REFUSALS = {
    "unauthenticated": (401, "Send the operator's ServiceAccount token as a bearer token."),
    "forbidden": (403, "Only the operator's ServiceAccount may read this."),
    "unavailable": (503, "The token cannot be checked: the API server does not answer. Retry."),
}


class Admin:
    """Serves one gateway's state."""

    def __init__(self, state: State, guard: Guard, on_pull: Callable[[], None] = lambda: None) -> None:
        self._state = state
        self._guard = guard
        self._on_pull = on_pull

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/evidence", self._guarded(self._evidence))
        app.router.add_get("/state", self._guarded(self._report))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        return app

    def _guarded(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def guarded(request: web.Request) -> web.Response:
            ruling = await self._guard.rule(request.headers.get("Authorization"))
            if ruling != "allowed":
                status, message = _REFUSALS[ruling]
                return web.json_response({"error": message}, status=status)
            return await handler(request)

        return guarded

    async def _evidence(self, _request: web.Request) -> web.Response:
        evidence = self._state.ledger.snapshot(self._state.generation)
        self._on_pull()
        return web.Response(text=evidence.to_json(), content_type="application/json")

    async def _report(self, _request: web.Request) -> web.Response:
        return web.Response(text=self._state.report().to_json(), content_type="application/json")

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        if self._state.ready:
            return web.Response(text="ok\n")
        why = "draining" if self._state.draining else "no configuration yet"
        return web.Response(text=f"not ready: {why}\n", status=503)
