"""Every field a user may write is read somewhere: a field that is accepted and ignored is a lie."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from rlhf_trainer import config
from rlhf_trainer.config import Spec

ROOT = Path(__file__).resolve().parents[2]
# What the operator alone acts on (URIs and digests are resolved by it) counts as read too.
SOURCES = ("trainer/rlhf_trainer", "operator/rlhf_operator")


def attributes_read(roots: tuple[Path, ...]) -> set[str]:
    """Names read as ``something.name``, but where they are declared and where they are only checked: refusing a bad
    value does not make a good one do anything."""
    read: set[str] = set()
    for root in roots:
        for path in root.rglob("*.py"):
            if path.parent.name != "config" and not path.name.startswith("preflight"):
                read |= set(_loaded(ast.parse(path.read_text())))
    return read


def _loaded(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr


def fields() -> list[tuple[str, str]]:
    models = [each for each in vars(config).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    return sorted((model.__name__, name) for model in models if model is not Spec for name in model.model_fields)


@pytest.fixture(scope="module")
def read() -> set[str]:
    return attributes_read(tuple(ROOT / source for source in SOURCES))


@pytest.mark.parametrize(("model", "name"), fields(), ids=lambda part: part)
def test_a_field_is_read(read: set[str], model: str, name: str) -> None:
    assert name in read, f"{model}.{name} is accepted and never read: implement it or take it out of the API"


def test_an_unread_field_is_found(tmp_path: Path) -> None:
    """Negative control: declared, assigned or only mentioned in a text is not read."""
    (tmp_path / "loop.py").write_text(
        'def run(training):\n    """Uses training.sparkle."""\n    training.glitter = 1\n    return training.seed\n'
    )
    assert attributes_read((tmp_path,)) == {"seed"}


def test_all_models_are_looked_at() -> None:
    assert len(fields()) > 80
