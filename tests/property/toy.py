"""A toy kind, as small as a kind can be that uses everything the engine offers.

A Widget owns a ConfigMap with its colour and one Job per attempt. A failed Job's outcome is written down before the
Job is deleted and the next attempt begins; after three attempts the Widget has failed. A Widget may wait for another.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf_operator.api.conditions import set_condition
from rlhf_operator.api.meta import ApiSpec, ApiStatus, Cel, Conditions, ConditionStatus, Name
from rlhf_operator.kinds.base import (
    CONFIG_MAP,
    JOB,
    ChildRef,
    Event,
    Key,
    KindSpec,
    Object,
    Observed,
    Plan,
    PrinterColumn,
)

MAX_ATTEMPTS = 3
ATTEMPT = "rlhf.dev/attempt"


class WidgetSpec(ApiSpec):
    color: str = Field("red", max_length=20)
    after: Name | None = None


class Outcome(ApiStatus):
    attempt: int
    result: Literal["Succeeded", "Failed"] = Field(max_length=16)


class WidgetStatus(ApiStatus):
    phase: str = Field("", max_length=32)
    attempt: int = 0
    outcomes: list[Outcome] = Field(default_factory=list, max_length=10)
    conditions: Conditions = Field(default_factory=list)


class Widget(ApiSpec):
    """A toy."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["Widget"] = "Widget"
    metadata: dict[str, str] = Field(default_factory=dict)
    spec: WidgetSpec = WidgetSpec()
    status: WidgetStatus | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = ()


def plan(observed: Observed) -> Plan:
    primary = observed.primary
    name, spec = primary["metadata"]["name"], primary.get("spec") or {}
    status = WidgetStatus.model_validate(primary.get("status") or {})
    generation = primary["metadata"].get("generation", 0)
    conditions = list(status.conditions)

    def done(phase: str, attempt: int, outcomes: list[Outcome], **actions: Any) -> Plan:
        new = WidgetStatus(phase=phase, attempt=attempt, outcomes=outcomes, conditions=conditions)
        events = () if phase == status.phase else (Event("Normal", phase, f"{name} is {phase}"),)
        return Plan(status=new.to_dict(), events=events, **actions)

    def condition(type: str, truth: bool, reason: str) -> list[ConditionStatus]:
        return set_condition(conditions, type, truth, reason, "", generation=generation, now=observed.now)

    conditions = condition("Accepted", True, "Accepted")
    config = _config(name, spec.get("color", ""))
    waiting_for = spec.get("after")
    if waiting_for and status.attempt == 0 and not _has_succeeded(observed, waiting_for):
        return done("Waiting", 0, [], apply=(config,))
    outcomes, delete = list(status.outcomes), []
    for job in observed.children["Job"]:
        attempt = int(job["metadata"]["labels"][ATTEMPT])
        result = _result(job)
        if result and all(known.attempt != attempt for known in outcomes):
            outcomes.append(Outcome(attempt=attempt, result=result))
        if result == "Failed":
            delete.append(ChildRef(JOB, job["metadata"]["namespace"], job["metadata"]["name"], job["metadata"]["uid"]))
    succeeded = any(known.result == "Succeeded" for known in outcomes)
    attempt = max([status.attempt, 1, *(known.attempt + (known.result == "Failed") for known in outcomes)])
    if succeeded or attempt > MAX_ATTEMPTS:
        phase = "Succeeded" if succeeded else "Failed"
        conditions = condition("Complete", succeeded, phase)
        last = min(attempt, MAX_ATTEMPTS)
        return done(phase, last, outcomes, apply=(config,), delete=tuple(delete), status_first=True)
    conditions = condition("Complete", False, "Running")
    actions = {"create": (_job(name, attempt),), "apply": (config,), "delete": tuple(delete)}
    return done("Running", attempt, outcomes, status_first=True, requeue_after=3600.0, **actions)


def _config(name: str, color: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config"},
        "data": {"color": color},
    }


def _job(name: str, attempt: int) -> Object:
    container = {"name": "main", "image": "toy", "resources": {"limits": {"cpu": 0.5}}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name}-a{attempt}", "labels": {ATTEMPT: str(attempt)}},
        "spec": {"backoffLimit": 0, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }


def _result(job: Object) -> Literal["Succeeded", "Failed"] | None:
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            return "Succeeded" if condition["type"] == "Complete" else "Failed"
    return None


def _has_succeeded(observed: Observed, name: str) -> bool:
    other = observed.related[Key("Widget", observed.primary["metadata"]["namespace"], name)]
    return other is not None and (other.get("status") or {}).get("phase") == "Succeeded"


def references(primary: Object) -> frozenset[Key]:
    after = (primary.get("spec") or {}).get("after")
    return frozenset({Key("Widget", primary["metadata"]["namespace"], after)} if after else ())


WIDGET = KindSpec(
    model=Widget,
    kind="Widget",
    plural="widgets",
    singular="widget",
    short_names=("wd",),
    plan=plan,
    children=(JOB, CONFIG_MAP),
    references=references,
    printer_columns=(PrinterColumn("Phase", "string", ".status.phase"),),
)
