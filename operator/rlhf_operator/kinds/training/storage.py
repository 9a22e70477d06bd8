"""`pvc://claim/path`: where a pod sees it, which claims it mounts, and how a path in a pod reads as a URI again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

IN_ROOT = "/mnt/rlhf/in"
OUT_ROOT = "/mnt/rlhf/out"
SCHEME = "pvc://"


class BadUri(ValueError):
    """A URI the operator cannot mount; says which one and what it takes."""


@dataclass(frozen=True)
class Volume:
    claim: str
    path: str  # inside the claim; "" is its root

    @classmethod
    def parse(cls, uri: str) -> Volume:
        """Raises BadUri."""
        claim, _, path = uri.removeprefix(SCHEME).partition("/")
        parts = path.split("/") if path else []
        if not uri.startswith(SCHEME) or not claim or any(part in ("", ".", "..") for part in parts):
            raise BadUri(f"{uri!r} is no storage location: write pvc://<claim>/<path> without empty parts, . and ..")
        return cls(claim, path)

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.claim}/{self.path}".rstrip("/")

    def joined(self, *parts: str) -> Volume:
        return Volume(self.claim, "/".join(part for part in (self.path, *parts) if part))

    def at(self, root: str) -> str:
        """The path in a pod that mounts the claim under a root."""
        return f"{root}/{self.claim}/{self.path}".rstrip("/")


def uri_of(pod_path: str) -> str | None:
    """The URI of a path below the mounts; None for any other path."""
    for root in (OUT_ROOT, IN_ROOT):
        if pod_path.startswith(f"{root}/"):
            try:
                return Volume.parse(SCHEME + pod_path.removeprefix(f"{root}/")).uri
            except BadUri:
                return None
    return None


def mounts(inputs: Iterable[Volume], output: Volume, writable: bool = True) -> tuple[list[Any], list[Any]]:
    """The pod's volumes and the container's volumeMounts: one volume a claim, inputs read-only."""
    readable = sorted({volume.claim for volume in inputs})
    claims = sorted({*readable, output.claim})
    names = {claim: f"claim-{index}" for index, claim in enumerate(claims)}
    volumes = [{"name": names[claim], "persistentVolumeClaim": {"claimName": claim}} for claim in claims]
    volume_mounts = [{"name": names[claim], "mountPath": f"{IN_ROOT}/{claim}", "readOnly": True} for claim in readable]
    volume_mounts.append(
        {"name": names[output.claim], "mountPath": f"{OUT_ROOT}/{output.claim}", "readOnly": not writable}
    )
    return volumes, volume_mounts
