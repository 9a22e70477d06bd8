"""The three calls this pod makes to the Kubernetes API, by its own ServiceAccount: no client library needed.

The token is read anew for every call, because the kubelet rotates it.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from rlhf_gateway.wire import TOKEN_AUDIENCE

_LINE_BYTES = 2 << 20  # a watch event is one line, and etcd holds objects up to 1.5 MiB
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class ApiError(Exception):
    """The API said no, or nothing. `status` is 0 when there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ApiServer:
    """Where the API is and how to prove who we are."""

    url: str
    token_path: Path | None = None
    ca_path: Path | None = None

    @classmethod
    def in_cluster(cls, host: str, port: str, account: Path = SERVICE_ACCOUNT) -> ApiServer:
        named = f"[{host}]" if ":" in host else host
        return cls(f"https://{named}:{port}", account / "token", account / "ca.crt")


class KubeApi:
    """A few requests over one session."""

    def __init__(self, session: aiohttp.ClientSession, server: ApiServer) -> None:
        self._session = session
        self._server = server
        self._ssl: ssl.SSLContext | bool = (
            ssl.create_default_context(cafile=str(server.ca_path)) if server.ca_path is not None else True
        )

    async def list_config_map(self, namespace: str, name: str) -> tuple[dict[str, Any] | None, str]:
        """The ConfigMap, or None when there is none, and the resourceVersion to watch from. Raises ApiError."""
        params = {"fieldSelector": f"metadata.name={name}"}
        found = await self._json("GET", f"/api/v1/namespaces/{namespace}/configmaps", params=params)
        items = found.get("items") or [None]
        return items[0], found["metadata"]["resourceVersion"]

    async def watch_config_map(
        self, namespace: str, name: str, resource_version: str, seconds: int
    ) -> AsyncIterator[dict[str, Any]]:
        """Watch events until the server ends the watch. Raises ApiError (410: list again)."""
        params = {
            "fieldSelector": f"metadata.name={name}",
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
        }
        # A silent connection is a dead one soon after the server should have ended the watch.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=seconds + 10)
        path = f"/api/v1/namespaces/{namespace}/configmaps"
        try:
            async with self._session.get(
                self._server.url + path,
                params=params,
                headers=self._headers(),
                ssl=self._ssl,
                timeout=timeout,
                read_bufsize=_LINE_BYTES,
            ) as response:
                await _check(response)
                async for line in response.content:
                    if line.strip():
                        yield _event(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ApiError(0, f"watch broken: {error!r}") from error

    async def review_token(self, token: str) -> str | None:
        """Whose token it is, by TokenReview; None when it is no token that is valid here. Raises ApiError."""
        spec = {"token": token, "audiences": [TOKEN_AUDIENCE]}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        answer = await self._json("POST", "/apis/authentication.k8s.io/v1/tokenreviews", json=review)
        status = answer.get("status", {})
        # A server that knows nothing of audiences would accept any token, and returns none.
        if not status.get("authenticated") or TOKEN_AUDIENCE not in (status.get("audiences") or ()):
            return None
        username = status.get("user", {}).get("username")
        return username if isinstance(username, str) else None

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with self._session.request(
                method, self._server.url + path, headers=self._headers(), ssl=self._ssl, timeout=timeout, **arguments
            ) as response:
                await _check(response)
                parsed: dict[str, Any] = await response.json()
                return parsed
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ApiError(0, f"no answer from the API server: {error!r}") from error

    def _headers(self) -> dict[str, str]:
        if self._server.token_path is None:
            return {}
        return {"Authorization": f"Bearer {self._server.token_path.read_text().strip()}"}


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status >= 300:
        text = (await response.text())[:300]
        raise ApiError(response.status, f"{response.method} {response.url.path}: HTTP {response.status}: {text}")


def _event(line: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line)
    if event.get("type") == "ERROR":
        status = event.get("object", {})
        raise ApiError(int(status.get("code", 0)), f"watch ended: {status.get('message', status)}")
    return event
