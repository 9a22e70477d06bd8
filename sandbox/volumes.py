"""Persistent volumes that several pods share: folders of the host."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sandbox.errors import SandboxError

CAPACITY = "100Gi"  # not enforced: it is a folder
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def parse(name: str) -> tuple[str, str]:
    """`NAMESPACE/NAME` in its two parts."""
    namespace, slash, claim = name.partition("/")
    if not slash or not _LABEL.fullmatch(namespace) or not _LABEL.fullmatch(claim):
        raise SandboxError(f"{name!r} is no volume: write NAMESPACE/NAME in lower case letters, digits and dashes")
    return namespace, claim


def host_folder(volumes: Path, namespace: str, claim: str) -> Path:
    return volumes / namespace / claim


def make_folder(folder: Path) -> None:
    """Anybody may write: pods run as users of their own choosing, and hostPath knows no fsGroup."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)


def manifest(namespace: str, claim: str, folder: Path) -> str:
    """The namespace, and a volume and claim that are bound to each other and to nothing else."""
    # Deleting the claim keeps the folder; asking for the volume again binds it anew.
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume_name(namespace, claim)},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": CAPACITY},
            "claimRef": {"namespace": namespace, "name": claim},
            "hostPath": {"path": str(folder), "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
        },
    }
    request = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": namespace, "name": claim},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": CAPACITY}},
            "storageClassName": "",
            "volumeName": volume_name(namespace, claim),
        },
    }
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [space, volume, request]})


def volume_name(namespace: str, claim: str) -> str:
    return f"{namespace}.{claim}"  # a dot keeps a-b/c and a/b-c apart
