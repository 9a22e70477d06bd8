"""The contract between the engine and a kind: a pure function from what is observed to what shall be.

    Observed --plan()--> Plan --engine--> deletes, creates, applies, one status patch, events

A kind is one `KindSpec`: the engine, the watches, RBAC, CRD YAML, metrics and the contract tests are derived from it.
`plan` must be total (never raises on any observed state that the CRD schema admits), deterministic and idempotent:
planning again on the state it asked for asks for nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

Object = Mapping[str, Any]  # a Kubernetes object as plain JSON


class Resource(NamedTuple):
    """A watched or written resource type."""

    group: str  # "" for core
    version: str
    kind: str
    plural: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


JOB = Resource("batch", "v1", "Job", "jobs")
POD = Resource("", "v1", "Pod", "pods")
SERVICE = Resource("", "v1", "Service", "services")
CONFIG_MAP = Resource("", "v1", "ConfigMap", "configmaps")
DEPLOYMENT = Resource("apps", "v1", "Deployment", "deployments")
PERSISTENT_VOLUME_CLAIM = Resource("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
ENDPOINT_SLICE = Resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
SERVICE_ACCOUNT = Resource("", "v1", "ServiceAccount", "serviceaccounts")
ROLE = Resource("rbac.authorization.k8s.io", "v1", "Role", "roles")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings")


class Key(NamedTuple):
    """Names one object: of our kinds, what the queue holds; of any kind, what an object refers to."""

    kind: str
    namespace: str
    name: str


class ChildRef(NamedTuple):
    """Names one child object to delete; uid guards against deleting a namesake."""

    resource: Resource
    namespace: str
    name: str
    uid: str | None = None


@dataclass(frozen=True)
class Pull:
    """An HTTP GET the plan wants repeated; the engine does it, keeps the newest answer and wakes the key.

    `key` is unique within the object; a pull that a later plan does not name any more is stopped.
    """

    key: str
    url: str
    every_seconds: float
    authenticated: bool = False  # send the operator's ServiceAccount token (gateway admin port)


@dataclass(frozen=True)
class Pulled:
    """Newest answer of a Pull: `body` is the parsed JSON of the last success, `error` that of the last try."""

    body: Any | None
    at: datetime | None  # of the last success
    error: str | None
    failing_since: datetime | None


@dataclass(frozen=True)
class Prices:
    """Money per hour of one unit of a resource, e.g. {"nvidia.com/gpu": 2.5, "cpu": 0.03}; empty: no prices known."""

    per_hour: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The operator's configuration as far as plans see it."""

    trainer_image: str
    gateway_image: str
    operator_namespace: str = "rlhf-system"
    operator_service_account: str = "rlhf-operator"
    cluster_domain: str = "cluster.local"
    image_pull_policy: str = "IfNotPresent"
    prices: Prices = field(default_factory=Prices)


@dataclass(frozen=True)
class Observed:
    """All that a plan may look at."""

    primary: Object
    children: Mapping[
        str, tuple[Object, ...]
    ]  # by Resource.kind, only those controlled by the primary or carrying its labels
    related: Mapping[Key, Object | None]  # what references() named, and of KindSpec.related what those named in turn;
    # None: it does not exist
    decisions: tuple[Object, ...]  # about this object, bound by their policy, oldest first; empty unless honoured
    decisions_honoured: bool  # the admission policy that binds spec.by to the requesting user is in place
    pulled: Mapping[str, Pulled]
    now: datetime  # aware, UTC
    settings: Settings


@dataclass(frozen=True)
class Event:
    """Posted after the status patch succeeded, deduplicated by (uid, reason, message)."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """What shall be. Executed in this order: deletes, creates, applies, status, events."""

    status: Mapping[str, Any]  # the whole status; the engine patches only when it differs from the live one
    delete: tuple[ChildRef, ...] = ()
    create: tuple[Object, ...] = ()  # POSTed if absent and never applied again (Jobs: Kueue edits them)
    apply: tuple[Object, ...] = ()  # server-side applied when "desired is a subset of live" does not hold
    events: tuple[Event, ...] = ()
    pulls: tuple[Pull, ...] = ()
    requeue_after: float | None = None  # seconds; deadlines only, never polling
    status_first: bool = False  # write the status before deletes, creates and applies (ledger before action)


@dataclass(frozen=True)
class PrinterColumn:
    name: str
    type: Literal["string", "integer", "number", "date"]
    json_path: str
    priority: int = 0


@dataclass(frozen=True)
class KindSpec:
    """One row of the table from which everything generic is derived."""

    model: type[BaseModel]  # the whole resource: apiVersion, kind, metadata, spec, status
    kind: str
    plural: str
    singular: str
    short_names: tuple[str, ...]
    plan: Callable[[Observed], Plan]
    children: tuple[Resource, ...]  # watched; RBAC verbs: get list watch create patch delete
    observed_only: tuple[Resource, ...] = ()  # watched, never written (Pods, EndpointSlices)
    # What the object reads besides its children: objects of our kinds, and of `related`, by name.
    references: Callable[[Object], frozenset[Key]] = lambda _primary: frozenset()
    related: tuple[Resource, ...] = ()  # watched whoever made them, never written (PersistentVolumeClaims)
    printer_columns: tuple[PrinterColumn, ...] = ()
    serves_users: bool = False  # its passes go before those of other kinds
    error_condition: str = "Accepted"  # the condition in which the engine says why it cannot execute a plan
