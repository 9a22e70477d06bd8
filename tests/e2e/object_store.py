"""A real S3 server that pods of the sandbox reach, on the node's own address: nothing else on the machine hears it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_trainer.data.access import write_bytes
from sandbox import network
from sandbox.cluster import Cluster
from tests.e2e.jobs_world import Body, Namespace
from tests.trainer import s3_server
from tests.trainer.s3_server import S3Server


@contextmanager
def object_store(cluster: Cluster, folder: Path) -> Iterator[S3Server]:
    in_its_network = ("nsenter", f"--target={cluster.init}", "--net", "--")
    with s3_server.running(folder, network.NODE_IP, in_its_network) as server:
        yield server


def upload(server: S3Server, source: Path, key: str) -> None:
    """A file, or a folder with all that is in it."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                below = f"/{path.relative_to(source)}" if path != source else ""
                write_bytes(f"s3://{server.bucket}/{key}{below}", path.read_bytes())


def store_of(server: S3Server, secret: str) -> Body:
    """What a job says of it."""
    environment = server.environment
    return {
        "endpoint": environment["AWS_ENDPOINT_URL"],
        "region": environment["AWS_REGION"],
        "secretRef": {"name": secret},
    }


def create_secret(namespace: Namespace, server: S3Server, name: str) -> None:
    """With one key more than pods are to see."""
    keys = {key: server.environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {**keys, "OTHER": "x"}}
    namespace.kubectl("create", "-f", "-", input=json.dumps(body))
