"""CustomResourceDefinitions, assembled from a resource's model and its names.

The YAML is a pure function of the models: sorted, without dates or versions of tools, so that it is committed and a
difference is a change somebody made (`python -m rlhf_operator.generate --check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from rlhf_operator.api.labels import GROUP, VERSION
from rlhf_operator.api.meta import NAME_RULE
from rlhf_operator.api.structural import VALIDATIONS, NotStructuralError, Schema, structural_schema

CATEGORY = "rlhf"

_API_VERSION = {
    "type": "string",
    "description": "Version of the schema of this object: rlhf.dev/v1alpha1.",
}
_KIND = {"type": "string", "description": "Kind of this object, in CamelCase."}


class Column(Protocol):
    """One column of `kubectl get`."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def json_path(self) -> str: ...
    @property
    def priority(self) -> int: ...


class ResourceDefinition(Protocol):
    """What a CRD is made of; the engine's KindSpec is one."""

    @property
    def model(self) -> type[BaseModel]: ...
    @property
    def kind(self) -> str: ...
    @property
    def plural(self) -> str: ...
    @property
    def singular(self) -> str: ...
    @property
    def short_names(self) -> tuple[str, ...]: ...
    @property
    def printer_columns(self) -> Sequence[Column]: ...


@dataclass(frozen=True)
class PlainColumn:
    name: str
    type: str
    json_path: str
    priority: int = 0


@dataclass(frozen=True)
class PlainResource:
    """A resource that nothing reconciles (Decision): a ResourceDefinition without a plan."""

    model: type[BaseModel]
    kind: str
    plural: str
    singular: str
    short_names: tuple[str, ...]
    printer_columns: tuple[PlainColumn, ...]


AGE = PlainColumn("Age", "date", ".metadata.creationTimestamp")


def custom_resource_definition(definition: ResourceDefinition) -> dict[str, Any]:
    """The CRD of one kind. Raises NotStructuralError where the model says what a CRD cannot."""
    schema = root_schema(definition)
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "additionalPrinterColumns": [_column(column) for column in _columns(definition)],
    }
    if "status" in schema["properties"]:
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{definition.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": definition.kind,
                "listKind": f"{definition.kind}List",
                "plural": definition.plural,
                "singular": definition.singular,
                "shortNames": list(definition.short_names),
                "categories": [CATEGORY],
            },
            "versions": [version],
        },
    }


def root_schema(definition: ResourceDefinition) -> Schema:
    """The schema of a whole object: the model's spec and status below what every Kubernetes object has."""
    schema = structural_schema(definition.model, envelope=True)
    properties = schema["properties"]
    if "spec" not in properties:
        raise NotStructuralError(definition.kind, "the model has no field spec", "add spec: <a model>")
    unknown = properties.keys() - {"spec", "status"}
    if unknown:
        raise NotStructuralError(definition.kind, f"fields {sorted(unknown)} beside spec", "move them into spec")
    return {
        **schema,
        "properties": {"apiVersion": _API_VERSION, "kind": _KIND, "metadata": {"type": "object"}, **properties},
        "required": ["spec"],
        VALIDATIONS: _unique([NAME_RULE.to_validation(), *schema.get(VALIDATIONS, ())]),
    }


def _unique(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for number, rule in enumerate(rules) if rule["rule"] not in {r["rule"] for r in rules[:number]}]


def _columns(definition: ResourceDefinition) -> list[Column]:
    """Age, as everywhere in kubectl, and last unless the kind puts it elsewhere."""
    columns = list(definition.printer_columns)
    return columns if any(column.name == AGE.name for column in columns) else [*columns, AGE]


def _column(column: Column) -> dict[str, Any]:
    out: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.json_path}
    if column.priority:
        out["priority"] = column.priority
    return out
