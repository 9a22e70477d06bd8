"""The only importer of the Kubernetes client: it brings login, TLS, token refresh and transport.

Its typed models are not used: parsing them costs several times the JSON itself, and they cannot express an apply
patch (a container without a name is refused before it is sent).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client, config

from rlhf_operator.api.labels import FIELD_MANAGER
from rlhf_operator.kinds.base import Resource
from rlhf_operator.kube.errors import TIMEOUT, ApiError, Outcome
from rlhf_operator.kube.interface import Dict, Listing
from rlhf_operator.obs.metrics import Metrics

_PAGE = 500
_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Api:
    """One connection pool to the API server. `max_in_flight` bounds what we ask of it at a time."""

    def __init__(
        self,
        configuration: Any,
        metrics: Metrics,
        *,
        max_in_flight: int = 32,
        timeout_seconds: float = 30.0,
        user_agent: str = FIELD_MANAGER,
    ) -> None:
        # A session that trusts the environment reads ~/.netrc in a thread before every request: a third of the
        # processor time of a busy operator. What is wanted of the environment is its proxy, which does not change.
        configuration.proxy = configuration.proxy or proxy_of(configuration.host)
        configuration.client_session_kwargs = {"trust_env": False, **(configuration.client_session_kwargs or {})}
        self._client = client.ApiClient(configuration)
        self._agent = user_agent
        self._metrics = metrics
        self._slots = asyncio.Semaphore(max_in_flight)
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=10)

    @classmethod
    async def connect(cls, metrics: Metrics, *, kubeconfig: Path | None = None, **limits: Any) -> Self:
        """With `kubeconfig` if named, else as the pod's ServiceAccount. `limits` as for the constructor."""
        configuration = client.Configuration()
        if kubeconfig is not None:
            await config.load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
        else:
            config.incluster_config.InClusterConfigLoader(
                token_filename=str(SERVICE_ACCOUNT_TOKEN),
                cert_filename=config.incluster_config.SERVICE_CERT_FILENAME,
            ).load_and_set(configuration)
        return cls(configuration, metrics, **limits)

    async def close(self) -> None:
        await self._client.close()

    @property
    def server(self) -> str:
        return str(self._client.configuration.host)

    @property
    def proxy(self) -> str | None:
        found: str | None = self._client.configuration.proxy
        return found

    @property
    def tls(self) -> ssl.SSLContext:
        context = self._client.rest_client.ssl_context
        assert isinstance(context, ssl.SSLContext)
        return context

    async def authorization(self) -> dict[str, str]:
        """Headers that authenticate a request now; tokens are refreshed as they age."""
        settings = await self._client.configuration.auth_settings()
        secret = next((entry["value"] for entry in settings.values() if entry.get("value")), None)
        return {"Authorization": secret} if secret else {}

    async def get(self, resource: Resource, namespace: str, name: str) -> Dict | None:
        try:
            return await self._request("GET", resource, namespace, name)
        except ApiError as error:
            if error.outcome is Outcome.ABSENT:
                return None
            raise

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        query = {"limit": str(_PAGE), "labelSelector": labels, "fieldSelector": fields}
        return await self._pages(resource, namespace, query, "application/json")

    async def list_metadata(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        query = {"resourceVersion": "0", "labelSelector": labels, "fieldSelector": fields}
        return await self._pages(resource, namespace, query, _METADATA_LIST)

    async def create(self, resource: Resource, body: Dict) -> Dict:
        namespace = body["metadata"].get("namespace", "")
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}  # a typo in a podTemplate must not be lost
        return await self._request("POST", resource, namespace, body=body, query=query)

    async def replace(self, resource: Resource, body: Dict) -> Dict:
        meta = body["metadata"]
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request("PUT", resource, meta.get("namespace", ""), meta["name"], body=body, query=query)

    async def merge(self, resource: Resource, namespace: str, name: str, patch: Dict) -> Dict:
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request("PATCH", resource, namespace, name, body=patch, query=query, content=_MERGE)

    async def apply(self, resource: Resource, body: Dict) -> Dict:
        meta = body["metadata"]
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request(
            "PATCH", resource, meta.get("namespace", ""), meta["name"], body=body, query=query, content=_APPLY
        )

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, status: Dict, resource_version: str
    ) -> Dict:
        patch = {"metadata": {"resourceVersion": resource_version}, "status": status}
        return await self._request(
            "PATCH",
            resource,
            namespace,
            name,
            subresource="status",
            body=patch,
            query={"fieldManager": FIELD_MANAGER},
            content=_MERGE,
        )

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str | None = None) -> Dict | None:
        body: Dict = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            answer = await self._request("DELETE", resource, namespace, name, body=body)
        except ApiError as error:
            if error.outcome in (Outcome.ABSENT, Outcome.CONFLICT):
                return None
            raise
        return None if answer.get("kind") == "Status" or "deletionTimestamp" not in answer["metadata"] else answer

    async def _pages(self, resource: Resource, namespace: str | None, query: dict[str, str], accept: str) -> Listing:
        items: list[Dict] = []
        while True:
            page = await self._request("GET", resource, namespace or "", query=query, accept=accept, verb="LIST")
            items.extend(page.get("items") or ())
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                # Items of a typed list carry neither kind nor apiVersion; every object of ours does.
                for item in items:
                    item["apiVersion"], item["kind"] = resource.api_version, resource.kind
                return Listing(items, str(meta.get("resourceVersion", "")))
            query = {**query, "continue": meta["continue"]}

    async def _request(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str = "",
        *,
        subresource: str = "",
        body: Dict | None = None,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
        verb: str = "",
    ) -> Dict:
        url = self.server + path_of(resource, namespace, name, subresource)
        parameters = {key: value for key, value in (query or {}).items() if value}
        if parameters:
            url += "?" + urlencode(parameters)
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": self._agent}
        what = f"{(verb or method).lower()} {resource.kind} {namespace}/{name}".rstrip("/")
        started = time.perf_counter()
        code = TIMEOUT
        try:
            async with self._slots:
                headers |= await self.authorization()
                answer = await self._client.call_api(method, url, headers, body, _request_timeout=self._timeout)
                code = answer.status
                raw = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            text = f"{what}: no answer from {self.server} ({type(error).__name__}: {error})"
            raise ApiError(TIMEOUT, text) from error
        finally:
            self._metrics.api_request(verb or method, resource.plural, code, time.perf_counter() - started)
        return _parsed(code, raw, what, answer.headers.get("Retry-After"))


def proxy_of(server: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for a server."""
    parts = urlsplit(server)
    if not parts.hostname or proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


def path_of(resource: Resource, namespace: str | None, name: str = "", subresource: str = "") -> str:
    """The URL path of an object, or of a collection without `name`; cluster-wide without `namespace`."""
    parts = ["", "apis" if resource.group else "api", resource.api_version]
    if namespace:
        parts += ["namespaces", quote(namespace)]
    parts += [resource.plural, *([quote(name)] if name else []), *([subresource] if subresource else [])]
    return "/".join(parts)


def _parsed(code: int, raw: bytes, what: str, retry_after: str | None) -> Dict:
    try:
        body = json.loads(raw) if raw else {}
    except ValueError:
        body = raw.decode(errors="replace")
    if 200 <= code < 300 and isinstance(body, dict):
        return body
    wait: float | None = None
    if retry_after:
        with contextlib.suppress(ValueError):  # a date instead of seconds: our own backoff will do
            wait = float(retry_after)
    raise ApiError.from_body(code, body, what, wait)
