"""Where the pods of a job see what its URIs name, what they mount for it, and how a path in a pod reads as a URI again.

`pvc://claim/path` is mounted. `s3://bucket/key` is brought to a scratch volume of the pod by its first process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_operator.kinds.training.objects import mappings, text

IN_ROOT = "/mnt/rlhf/in"
OUT_ROOT = "/mnt/rlhf/out"
SCRATCH_ROOT = "/mnt/rlhf/scratch"
SCRATCH = "scratch"
SCHEME, STORE_SCHEME = "pvc://", "s3://"


class BadUri(ValueError):
    """A URI that pods cannot be given; says which one and what it takes."""


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


@dataclass(frozen=True)
class Stored:
    """An object, or all objects below a key."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Stored:
        """Raises BadUri."""
        bucket, _, key = uri.removeprefix(STORE_SCHEME).partition("/")
        if not uri.startswith(STORE_SCHEME) or not bucket or any(part in ("", ".", "..") for part in key.split("/")):
            raise BadUri(f"{uri!r} is no object: write s3://<bucket>/<key> without empty parts, . and ..")
        return cls(bucket, key)

    def at(self, name: str) -> str:
        """The path in a pod. Of its own for each input: one key may lie below another."""
        return f"{SCRATCH_ROOT}/{name}/{self.key.rpartition('/')[2]}"


Place = Volume | Stored


def place_of(uri: str) -> Place:
    """Where an input is. Raises BadUri."""
    return Stored.parse(uri) if uri.startswith(STORE_SCHEME) else Volume.parse(uri)


def input_path(name: str, uri: str) -> str:
    """The path in a pod of the input of that name. Raises BadUri."""
    place = place_of(uri)
    return place.at(name) if isinstance(place, Stored) else place.at(IN_ROOT)


def uri_of(pod_path: str) -> str | None:
    """The URI of a path below the mounts; None for any other path."""
    for root in (OUT_ROOT, IN_ROOT):
        if pod_path.startswith(f"{root}/"):
            try:
                return Volume.parse(SCHEME + pod_path.removeprefix(f"{root}/")).uri
            except BadUri:
                return None
    return None


def mounts(inputs: Iterable[Place], output: Volume, writable: bool = True) -> tuple[list[Any], list[Any]]:
    """The pod's volumes and the container's volumeMounts: one volume a claim, inputs read-only; a scratch volume where
    an input is loaded from a store. It is one of its own, for podTemplate to replace by a larger one."""
    places = tuple(inputs)
    readable = sorted({place.claim for place in places if isinstance(place, Volume)})
    claims = sorted({*readable, output.claim})
    names = {claim: f"claim-{index}" for index, claim in enumerate(claims)}
    volumes: list[Any] = [{"name": names[claim], "persistentVolumeClaim": {"claimName": claim}} for claim in claims]
    volume_mounts: list[Any] = [
        {"name": names[claim], "mountPath": f"{IN_ROOT}/{claim}", "readOnly": True} for claim in readable
    ]
    volume_mounts.append(
        {"name": names[output.claim], "mountPath": f"{OUT_ROOT}/{output.claim}", "readOnly": not writable}
    )
    if any(isinstance(place, Stored) for place in places):
        volumes.append({"name": SCRATCH, "emptyDir": {}})
        volume_mounts.append({"name": SCRATCH, "mountPath": SCRATCH_ROOT})
    return volumes, volume_mounts


def scratch_is_a_claim(pod_template: Mapping[str, Any]) -> bool:
    """One claim would be the scratch of all pods at once, which load the same files at the same time."""
    volumes = mappings(pod_template, "spec", "volumes")
    return any(text(volume, "name") == SCRATCH and "persistentVolumeClaim" in volume for volume in volumes)
