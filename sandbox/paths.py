"""Where the sandbox keeps things: state of one checkout, and a cache shared by all of a user's checkouts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Paths:
    """Folders of one sandbox.

    `state` may be deleted while the sandbox is down: images are then built again. `cache` holds what is
    named by the hash of its content (binaries, the base image's archive) and outlives any checkout.
    """

    state: Path
    cache: Path

    @property
    def cluster(self) -> Path:
        return self.state / "cluster"

    @property
    def pki(self) -> Path:
        return self.cluster / "pki"

    @property
    def config(self) -> Path:
        return self.cluster / "config"

    @property
    def logs(self) -> Path:
        return self.cluster / "logs"

    @property
    def containerd(self) -> Path:
        return self.cluster / "containerd"

    @property
    def volumes(self) -> Path:
        return self.cluster / "volumes"

    @property
    def kubeconfig(self) -> Path:
        return self.cluster / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.logs / "audit.jsonl"

    @property
    def control_plane(self) -> Path:
        return self.state / "control-plane"


def from_environment(environment: Mapping[str, str] = os.environ) -> Paths:
    """`RLHF_SANDBOX_DIR` or `.sandbox/` in the checkout; `RLHF_SANDBOX_CACHE` or the XDG cache folder."""
    state = Path(environment.get("RLHF_SANDBOX_DIR") or CHECKOUT / ".sandbox")
    user_cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(environment.get("RLHF_SANDBOX_CACHE") or user_cache / "rlhf-operator")
    return Paths(state=state.absolute(), cache=cache.absolute())
