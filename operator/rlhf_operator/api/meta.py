"""Building blocks of the API models, and the markers the CRD generator reads.

A model of a resource is an ordinary pydantic model; what a structural schema needs beyond JSON Schema is said with
markers:

* ``cel_rules`` on a model: CEL rules of that object (KEP-2876).
* ``Cel(...)`` in an ``Annotated`` field: CEL rules of that field.
* ``ListMap(keys)`` / ``ListSet()`` on a list: ``x-kubernetes-list-type`` (lists are atomic otherwise).
* ``PreserveUnknown()`` on a mapping: ``x-kubernetes-preserve-unknown-fields``.
* ``IntOrString()`` on an ``int | str``: ``x-kubernetes-int-or-string``.
* ``Form(message)`` after a ``Field(pattern=...)``: the pattern as a CEL rule with a message for people.

The markers write their `x-kubernetes-*` keys into the model's JSON schema themselves; `api.structural` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlhf_trainer.config import INPUT_URI, PVC_URI, Spec


class Marker(ABC):
    """Base of what an `Annotated` field may carry for the CRD generator."""

    @abstractmethod
    def schema_keys(self) -> dict[str, Any]:
        """The keys this marker adds beside the field's own."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = dict(handler(core_schema))
        for key, value in self.schema_keys().items():
            schema[key] = [*schema[key], *value] if isinstance(value, list) and key in schema else value
        return schema


@dataclass(frozen=True)
class Cel(Marker):
    """One `x-kubernetes-validations` entry. `message` says what is wrong and what to do.

    `field_path` (such as ".training") moves the error from the object that holds the rule to one of its fields.
    """

    rule: str
    message: str
    reason: str = "FieldValueInvalid"
    optional_old_self: bool = False
    field_path: str = ""

    def to_validation(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"rule": self.rule, "message": self.message, "reason": self.reason}
        if self.optional_old_self:
            entry["optionalOldSelf"] = True
        if self.field_path:
            entry["fieldPath"] = self.field_path
        return entry

    def schema_keys(self) -> dict[str, Any]:
        return {"x-kubernetes-validations": [self.to_validation()]}


@dataclass(frozen=True)
class ListMap(Marker):
    keys: tuple[str, ...]

    def schema_keys(self) -> dict[str, Any]:
        return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(self.keys)}


@dataclass(frozen=True)
class ListSet(Marker):
    def schema_keys(self) -> dict[str, Any]:
        return {"x-kubernetes-list-type": "set"}


@dataclass(frozen=True)
class PreserveUnknown(Marker):
    def schema_keys(self) -> dict[str, Any]:
        return {"x-kubernetes-preserve-unknown-fields": True}


@dataclass(frozen=True)
class IntOrString(Marker):
    """Of an `int | str`: a quantity or a percentage."""

    def schema_keys(self) -> dict[str, Any]:
        return {"x-kubernetes-int-or-string": True}


@dataclass(frozen=True)
class Form:
    """Beside `Field(pattern=...)`, after it: the server then says `message` instead of showing a regular expression."""

    message: str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = dict(handler(core_schema))
        pattern = schema.pop("pattern")
        return {
            **schema,
            "x-kubernetes-validations": [Cel(f"self.matches(r'{pattern}')", self.message).to_validation()],
        }


class ApiSpec(Spec):
    """Part of a spec: camelCase, unknown fields refused, immutable, with CEL rules."""

    cel_rules: ClassVar[tuple[Cel, ...]] = ()


class ApiStatus(BaseModel):
    """Part of a status: written by us, read back leniently (an older operator may meet newer fields)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    cel_rules: ClassVar[tuple[Cel, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON for a status patch: no nulls, RFC 3339 times."""
        dumped: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return dumped


Digest = Annotated[
    str,
    Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="sha256:<64 hex digits>"),
    Form("must be sha256: followed by 64 lower-case hex digits"),
]
_CLAIM_FORM = "<claim> is a PersistentVolumeClaim in the same namespace; no part of the path starts with a dot"
ClaimUri = Annotated[
    str,
    Field(
        pattern=PVC_URI,
        max_length=512,
        description="pvc://<claim>/<path>: a PersistentVolumeClaim in the same namespace and a path in it.",
    ),
    Form(
        f"must be pvc://<claim>/<path>, where {_CLAIM_FORM}; s3:// is for inputs of training jobs alone: checkpoints "
        "are published by a rename, which object stores do not have, and a server loads its model from a volume"
    ),
]
InputUri = Annotated[
    str,
    Field(
        pattern=INPUT_URI,
        max_length=512,
        description="pvc://<claim>/<path>: a PersistentVolumeClaim in the same namespace and a path in it. "
        "s3://<bucket>/<key>: an object, or a folder of them; every pod loads it to its own disk before it trains.",
    ),
    Form(
        f"must be pvc://<claim>/<path> or s3://<bucket>/<key>, where {_CLAIM_FORM}; credentials go into the Secret "
        "that spec.objectStore.secretRef names"
    ),
]
Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=40,
        description="Name of an object in the same namespace.",
    ),
    Form("must be the name of an object in the same namespace: a-z, 0-9 and '-', starting with a letter"),
]


class Source(ApiSpec):
    """Where something is and what it must hash to."""

    uri: InputUri
    digest: Digest


class ClaimSource(Source):
    """On a volume, and what it must hash to."""

    uri: ClaimUri


class JobRef(ApiSpec):
    """An upstream job in the same namespace; its artifact's digest is chained into the status."""

    name: Name


class ArtifactSource(ApiSpec):
    """Either the artifact of an upstream job, or a pinned one."""

    job_ref: JobRef | None = None
    uri: InputUri | None = None
    digest: Digest | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "has(self.jobRef) != has(self.uri)",
            "set exactly one of jobRef and uri: jobRef waits for that job, uri names a finished artifact",
        ),
        Cel(
            "has(self.uri) == has(self.digest)",
            "uri and digest go together: a uri without its digest is not an identity",
        ),
    )


class ClaimArtifactSource(ArtifactSource):
    """Either the artifact of an upstream job, or a pinned one on a volume."""

    uri: ClaimUri | None = None


class ConditionStatus(ApiStatus):
    """meta/v1 Condition."""

    type: Annotated[str, Field(max_length=316)]
    status: Annotated[str, Field(pattern="^(True|False|Unknown)$")]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    last_transition_time: str
    observed_generation: int = 0


# Names of Jobs, Services and Deployments are derived from it, and these are limited to 63 characters.
NAME_RULE = Cel(
    "size(self.metadata.name) <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "metadata.name must be at most 40 characters of a-z, 0-9 and '-', start with a letter and not end with '-': "
    "names of other objects are built from it",
)

Conditions = Annotated[list[ConditionStatus], ListMap(("type",)), Field(max_length=32)]
