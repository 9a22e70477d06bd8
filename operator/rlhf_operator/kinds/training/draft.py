"""What a pass is about to ask for: a plan in the making, local to one call of plan()."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from rlhf_operator.api.training_status import Attempt, TrainingJobStatus
from rlhf_operator.kinds.base import ChildRef, Event, Object, Plan, Pull, Resource
from rlhf_operator.kinds.training.attempts import edit, is_open, record
from rlhf_operator.kinds.training.children import size_of
from rlhf_operator.kinds.training.job import Job
from rlhf_operator.kinds.training.limits import Limit, limits_of
from rlhf_operator.kinds.training.objects import deleting, name_of, uid_of
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.resources import Shape

Why = tuple[Reason, str]


@dataclass
class Draft:
    """`refused`, `held`, `waiting` and `problem` say why nothing goes on, from lasting to passing."""

    job: Job[Any]
    status: TrainingJobStatus
    refused: Why | None = None  # the spec, or what it names, cannot be run
    held: Why | None = None  # suspended, by the user or by the operator
    waiting: Why | None = None  # for something that comes by itself
    problem: Why | None = None  # of the pods
    ended: Why | None = None  # why the job has come to its end in this pass
    deletes: list[ChildRef] = field(default_factory=list)
    creates: list[Object] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)

    @property
    def now(self) -> datetime:
        return self.job.now

    @property
    def open(self) -> Attempt | None:
        """The attempt that has not ended."""
        last = self.status.attempts[-1] if self.status.attempts else None
        return last if last is not None and is_open(last) else None

    @property
    def last(self) -> Attempt | None:
        return self.status.attempts[-1] if self.status.attempts else None

    @cached_property
    def size(self) -> Shape:
        return size_of(self.job)

    @property
    def cost_per_hour(self) -> float | None:
        return self.size.cost_per_hour(self.job.observed.settings.prices)

    def limits(self) -> tuple[Limit, ...]:
        return limits_of(self.job.spec, self.status, self.now, self.size, self.cost_per_hour)

    def add(self, attempt: Attempt) -> None:
        self.status = record(self.status, attempt)

    def edit(self, attempt: Attempt, **changes: Any) -> None:
        self.status = edit(self.status, attempt.number, **changes)

    def set(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)

    def wake(self, at: datetime | None) -> None:
        if at is not None and at > self.now:
            self.wakes.append(at)

    def create(self, child: Object) -> None:
        """Asks for a child unless one of ours has its name already."""
        if self.job.child(str(child["kind"]), name_of(child)) is None:
            self.creates.append(child)

    def delete(self, resource: Resource, child: Object) -> None:
        if not deleting(child):
            self.deletes.append(ChildRef(resource, self.job.namespace, name_of(child), uid_of(child)))

    def plan(self, events: tuple[Event, ...]) -> Plan:
        """The ledger is written before anything is done: an action without its entry could not be told again."""
        return Plan(
            status=self.status.to_dict(),
            delete=tuple(self.deletes),
            create=tuple(self.creates),
            events=events,
            pulls=tuple(self.pulls),
            requeue_after=(min(self.wakes) - self.now).total_seconds() if self.wakes else None,
            status_first=True,
        )
