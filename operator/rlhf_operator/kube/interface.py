"""What the engine needs of the Kubernetes API. `api.Api` is the real one; tests bring one in memory."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from rlhf_operator.kinds.base import Resource

Dict = dict[str, Any]


class Listing(NamedTuple):
    items: list[Dict]
    resource_version: str


class KubeApi(Protocol):
    """Every method raises `errors.ApiError`; a missing object is None on `get` and no error on `delete`."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Dict | None: ...

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing: ...

    async def list_metadata(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        """Only metadata, and from the server's cache (resourceVersion=0): cheap, perhaps a moment old."""
        ...

    async def create(self, resource: Resource, body: Dict) -> Dict: ...

    async def replace(self, resource: Resource, body: Dict) -> Dict:
        """PUT; refused with 409 unless metadata.resourceVersion is the live one."""
        ...

    async def merge(self, resource: Resource, namespace: str, name: str, patch: Dict) -> Dict: ...

    async def apply(self, resource: Resource, body: Dict) -> Dict:
        """Server-side apply with our field manager, forced: only ever for our own children."""
        ...

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, status: Dict, resource_version: str
    ) -> Dict:
        """JSON merge patch of /status; refused with 409 unless the live object is at `resource_version`."""
        ...

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str | None = None) -> Dict | None:
        """Background deletion; returns the object if it lives on with a deletionTimestamp, None if it is gone.

        A namesake with another uid is left alone."""
        ...
