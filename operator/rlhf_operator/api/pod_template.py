"""The override block for pods: typed where a mistake would be silent, open everywhere else.

A whole PodTemplateSpec would make each CRD larger than an annotation may be. So only the outline is typed: unknown
top-level fields, a list for a map, a container without a name are refused when the object is applied, and CEL sees the
names of environment variables. The rest is kept as it is, and the API server checks it when the pods are created.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlhf_operator.api.meta import Cel

_OPEN = "x-kubernetes-preserve-unknown-fields"
_LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 65536}, "maxProperties": 64}


@dataclass(frozen=True)
class PodTemplate:
    """Of a `dict[str, Any]`. `env` holds CEL rules for every environment variable of every container."""

    env: tuple[Cel, ...] = ()

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        del core_schema, handler  # Python sees a plain mapping, the API server this outline
        return {
            "type": "object",
            "properties": {
                "metadata": {
                    "type": "object",
                    "description": "Further labels and annotations of the pods.",
                    "properties": {
                        "labels": {**_LABELS, "description": "Labels; those of the operator win."},
                        "annotations": {**_LABELS, "description": "Annotations."},
                    },
                },
                "spec": {
                    "type": "object",
                    "description": "Any fields of a PodSpec.",
                    _OPEN: True,
                    "properties": {"containers": self._containers()},
                },
            },
        }

    def _containers(self) -> dict[str, Any]:
        variable: dict[str, Any] = {
            "type": "object",
            _OPEN: True,
            "properties": {"name": _name("Name of the variable.", 256)},
            "required": ["name"],
        }
        if self.env:
            variable["x-kubernetes-validations"] = [rule.to_validation() for rule in self.env]
        container = {
            "type": "object",
            _OPEN: True,
            "properties": {
                "name": _name("Name of the container; a generated one is changed, any other is added.", 63),
                "env": _by_name(variable, "Environment variables.", 128),
            },
            "required": ["name"],
        }
        return _by_name(container, "Containers, merged by name.", 16)


def _name(description: str, longest: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": longest, "description": description}


def _by_name(items: dict[str, Any], description: str, most: int) -> dict[str, Any]:
    return {
        "type": "array",
        "description": description,
        "items": items,
        "maxItems": most,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    }
