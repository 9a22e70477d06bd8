"""One pass over one job: its identity, spec, status and children, read once and tolerant of anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_operator.api.labels import ATTEMPT, COMPONENT, OWNER_UID
from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.api.training import TrainingJobSpec
from rlhf_operator.api.training_status import Attempt, TrainingJobStatus
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, POD, SERVICE, Key, Object, Observed
from rlhf_operator.kinds.training.objects import controller_uid, integer, label_of, mapping, moment, text, uid_of
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.status import read_status

S = TypeVar("S", bound=TrainingJobSpec)


@dataclass(frozen=True)
class Input:
    """An input of the run, resolved: a place and the digest it must have."""

    uri: str
    digest: str


@dataclass(frozen=True)
class JobKind(Generic[S]):
    """What tells one training kind from another; everything else is shared."""

    kind: str
    infix: str  # children are named <job>-<infix>-a<attempt>
    spec_model: type[S]
    gate_reason: Reason
    inputs: Callable[[S], Mapping[str, Source | ArtifactSource]]  # by the name they have in the lineage
    batch: Callable[[S], tuple[str, int, int]]  # field, its value, what it must divide by besides the world size
    training: Callable[[S], BaseModel]  # with the identity inputs: what a checkpoint must agree with
    attempt_fields: Callable[[S], Mapping[str, Any]]  # AttemptConfig's fields of this kind, besides the inputs
    identity_inputs: tuple[str, ...]  # inputs that shape the trained weights
    unjudged: Callable[[S], str] = lambda _spec: ""  # why no run of this spec can get a verdict; "": it can


@dataclass(frozen=True)
class Job(Generic[S]):
    """A job as observed. When `problem` says what is wrong with the spec, there is none."""

    kind: JobKind[S]
    observed: Observed
    valid_spec: S | None
    problem: str
    status: TrainingJobStatus
    namespace: str
    name: str
    uid: str
    generation: int
    created_at: datetime | None

    @classmethod
    def read(cls, kind: JobKind[S], observed: Observed) -> Job[S]:
        primary = observed.primary
        spec, problem = _read_spec(kind, primary)
        return cls(
            kind=kind,
            observed=observed,
            valid_spec=spec,
            problem=problem,
            status=read_status(primary),
            namespace=text(primary, "metadata", "namespace"),
            name=text(primary, "metadata", "name"),
            uid=uid_of(primary),
            generation=integer(primary, "metadata", "generation") or 0,
            created_at=moment(primary, "metadata", "creationTimestamp"),
        )

    @property
    def spec(self) -> S:
        """Only of a job without a problem."""
        assert self.valid_spec is not None
        return self.valid_spec

    @property
    def now(self) -> datetime:
        return self.observed.now

    @property
    def labels(self) -> Mapping[str, Any]:
        return mapping(self.observed.primary, "metadata", "labels")

    def attempt_name(self, number: int) -> str:
        """Of the Job, the Service and the ConfigMap of an attempt."""
        return f"{self.name}-{self.kind.infix}-a{number}"

    def report_name(self, number: int) -> str:
        return f"{self.attempt_name(number)}-report"

    def children(self, kind: str) -> tuple[Object, ...]:
        """Ours by uid: pods by label (the Job controls them), the rest by their controller reference."""
        return self._ours.get(kind, ())

    @cached_property
    def _ours(self) -> Mapping[str, tuple[Object, ...]]:
        if not self.uid:
            return {}
        return {
            kind: tuple(child for child in found if isinstance(child, Mapping) and _owner(kind, child) == self.uid)
            for kind, found in self.observed.children.items()
        }

    def child(self, kind: str, name: str) -> Object | None:
        return next((child for child in self.children(kind) if text(child, "metadata", "name") == name), None)

    def pods(self, number: int, component: str) -> tuple[Object, ...]:
        return tuple(
            pod
            for pod in self.children(POD.kind)
            if attempt_of(pod) == number and label_of(pod, COMPONENT) == component
        )

    def foreign(self, name: str) -> bool:
        """Whether a Job of this name is there that is not ours."""
        return any(
            text(child, "metadata", "name") == name and controller_uid(child) != self.uid
            for child in self.observed.children.get(JOB.kind, ())
        )

    def related(self, key: Key) -> Object | None:
        return self.observed.related.get(key)

    @property
    def highest_attempt(self) -> int:
        """The larger of the status and what the children's labels show: a lost status write frees no name."""
        seen = [self.status.attempt, *(attempt.number for attempt in self.status.attempts)]
        for kind in (JOB.kind, SERVICE.kind, CONFIG_MAP.kind, POD.kind):
            seen += [attempt_of(child) for child in self.children(kind)]
        return max(0, *seen)

    @property
    def current(self) -> Attempt | None:
        return self.status.attempts[-1] if self.status.attempts else None


def _owner(kind: str, child: Object) -> str:
    return label_of(child, OWNER_UID) if kind == POD.kind else controller_uid(child)


def attempt_of(child: Object) -> int:
    """The attempt a child's label names; 0 when it names none."""
    label = label_of(child, ATTEMPT)
    return int(label) if label.isascii() and label.isdigit() and len(label) < 10 else 0


def _read_spec(kind: JobKind[S], primary: Object) -> tuple[S | None, str]:
    try:
        return kind.spec_model.model_validate(mapping(primary, "spec")), ""
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in ("spec", *first["loc"]))
        told = first["msg"].removeprefix("Value error, ")
        return None, f"{where}: {told}; correct the field or create the job anew"
