"""A base model and feedback of the smallest useful size, made once for all trainer tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer import s3_server
from tests.trainer.training_world import TinyWorld, make_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A random causal LM of a few thousand parameters with the desk's tokenizer, preferences and human scores."""
    return make_tiny_world(Path(tmp_path_factory.mktemp("tiny-world")))


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    with s3_server.running(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def reachable(object_store: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> s3_server.S3Server:
    """The server, and an environment that knows it and nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store


# With few tests of minutes each they would begin last, and one process would wait for the other at the end.
SLOWEST = ("test_launch", "test_zero_stages", "test_ppo_loop", "test_tracking", "test_vllm", "test_vllm_server",
           "test_world_size", "test_online_loop", "test_adapter_loops", "test_gate_seeds", "test_preference_loops",
           "test_killed_runs", "test_gate_policy", "test_adapters")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first; pytest-xdist is told to keep the order."""
    first = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
