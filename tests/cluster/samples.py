"""Valid objects, from the examples that users are given, and ways to spoil them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT / "crds"
EXAMPLES = ROOT / "manifests" / "examples"
DELETED = object()

Body = dict[str, Any]


def example(file: str) -> Body:
    """The example of that name, without ".yaml"."""
    body: Body = yaml.safe_load((EXAMPLES / f"{file}.yaml").read_text())
    return body


def changed(body: Body, changes: dict[str, Any]) -> Body:
    """A copy with dotted paths set (list items by number), or removed where the value is DELETED."""
    out = copy.deepcopy(body)
    for path, value in changes.items():
        node: Any = out
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if value is DELETED:
            del node[last]
        elif isinstance(node, list):
            node[int(last) : int(last) + 1] = [value]
        else:
            node[last] = value
    return out


def text(body: Body) -> str:
    return json.dumps(body)
