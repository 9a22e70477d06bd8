"""Building blocks of the API models, and the markers the CRD generator reads.

A model of a resource is an ordinary pydantic model; what a structural schema needs beyond JSON Schema is said with
markers:

* ``cel_rules`` on a model: CEL rules of that object (KEP-2876).
* ``Cel(...)`` in an ``Annotated`` field: CEL rules of that field.
* ``ListMap(keys)`` / ``ListSet()`` on a list: ``x-kubernetes-list-type`` (lists are atomic otherwise).
* ``PreserveUnknown()`` on a mapping: ``x-kubernetes-preserve-unknown-fields``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from rlhf_trainer.config import Spec


@dataclass(frozen=True)
class Cel:
    """One `x-kubernetes-validations` entry. `message` says what is wrong and what to do."""

    rule: str
    message: str
    reason: str = "FieldValueInvalid"
    optional_old_self: bool = False


@dataclass(frozen=True)
class ListMap:
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ListSet:
    pass


@dataclass(frozen=True)
class PreserveUnknown:
    pass


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


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="sha256:<64 hex digits>")]
Uri = Annotated[
    str,
    Field(
        pattern=r"^pvc://[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$",
        max_length=512,
        description="pvc://<claim>/<path>: a PersistentVolumeClaim in the same namespace and a path in it.",
    ),
]
Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=40,
        description="Name of an object in the same namespace.",
    ),
]


class Source(ApiSpec):
    """Where something is and what it must hash to."""

    uri: Uri
    digest: Digest


class JobRef(ApiSpec):
    """An upstream job in the same namespace; its artifact's digest is chained into the status."""

    name: Name


class ArtifactSource(ApiSpec):
    """Either the artifact of an upstream job, or a pinned one."""

    job_ref: JobRef | None = None
    uri: Uri | None = None
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


class ConditionStatus(ApiStatus):
    """meta/v1 Condition."""

    type: Annotated[str, Field(max_length=316)]
    status: Annotated[str, Field(pattern="^(True|False|Unknown)$")]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    last_transition_time: str
    observed_generation: int = 0


Conditions = Annotated[list[ConditionStatus], ListMap(("type",)), Field(max_length=32)]
