"""A base model and feedback of the smallest useful size, made once for all trainer tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.training_world import TinyWorld, make_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A random causal LM of a few thousand parameters with the desk's tokenizer, preferences and human scores."""
    return make_tiny_world(Path(tmp_path_factory.mktemp("tiny-world")))
