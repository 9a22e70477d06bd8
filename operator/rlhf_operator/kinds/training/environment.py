"""The environment of the trainer container, and what a podTemplate may not set in it. Secrets are named, never read."""

from __future__ import annotations

from typing import Any

from rlhf_operator.api.object_store import (
    ACCESS_KEY,
    ENDPOINT,
    REGION,
    SECRET_KEY,
    SESSION_TOKEN,
    ObjectStore,
)
from rlhf_operator.api.training import RESERVED_ENV, RESERVED_ENV_PREFIXES, TrainingJobSpec
from rlhf_operator.kinds.training.objects import mappings, text


def environment(spec: TrainingJobSpec, threads: int) -> list[dict[str, Any]]:
    """Ours, with the user's laid over it, and the way to the object store."""
    env = {"HOME": "/tmp", "OMP_NUM_THREADS": str(threads), **{found.name: found.value for found in spec.trainer.env}}
    plain = [{"name": name, "value": value} for name, value in env.items()]
    return plain if spec.object_store is None else [*plain, *_of_store(spec.object_store)]


def _of_store(store: ObjectStore) -> list[dict[str, Any]]:
    """Single keys, so that pods get nothing else that the Secret may hold."""
    found = [
        {"name": name, "value": value} for name, value in ((ENDPOINT, store.endpoint), (REGION, store.region)) if value
    ]
    return found if store.secret_ref is None else [*found, *_of_secret(store.secret_ref.name)]


def _of_secret(secret: str) -> list[dict[str, Any]]:
    def key(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, **more}}}

    return [key(ACCESS_KEY), key(SECRET_KEY), key(SESSION_TOKEN, optional=True)]


def taken_env(spec: TrainingJobSpec) -> str:
    """The first variable of a podTemplate that is not the user's to set: CEL cannot look inside."""
    store = () if spec.object_store is None else spec.object_store.variables()
    for field in ("initContainers", "containers"):
        for container in mappings(spec.trainer.pod_template, "spec", field):
            # A sidecar may have a store of its own.
            ours = store if (field, text(container, "name")) == ("containers", "trainer") else ()
            for name in (text(variable, "name") for variable in mappings(container, "env")):
                if name in RESERVED_ENV or name.startswith(RESERVED_ENV_PREFIXES) or name in ours:
                    return name
    return ""
