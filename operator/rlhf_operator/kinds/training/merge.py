"""podTemplate over the generated template: maps merge by key, the known lists by their key, the rest is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The merge keys of the PodSpec's lists that users extend; null deletes a key, as in a merge patch.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
# Lists whose items are one choice each: merged, a volume or a variable would have two sources, which is none.
REPLACED = frozenset({"volumes", "env"})


def merge(base: Any, override: Any, field: str = "") -> Any:
    """The override laid over the base; neither is changed."""
    if isinstance(base, Mapping) and isinstance(override, Mapping):
        merged = {key: value for key, value in base.items() if not (key in override and override[key] is None)}
        for key, value in override.items():
            if value is not None:
                merged[key] = merge(base.get(key), value, key)
        return merged
    if field in MERGE_KEYS and isinstance(base, list) and isinstance(override, list):
        return _merge_lists(base, override, field)
    return override


def _merge_lists(base: list[Any], override: list[Any], field: str) -> list[Any]:
    merged, key = list(base), MERGE_KEYS[field]
    for item in override:
        named = item.get(key) if isinstance(item, Mapping) else None
        at = next((i for i, other in enumerate(merged) if named is not None and _has(other, key, named)), None)
        if at is None:
            merged.append(item)
        else:
            merged[at] = merge({} if field in REPLACED else merged[at], item)
    return merged


def _has(item: Any, key: str, value: Any) -> bool:
    return isinstance(item, Mapping) and item.get(key) == value
