"""What both job kinds share in the API: pods, failure policy, budget, deadlines, and the common status."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rlhf_operator.api.meta import (
    ApiSpec,
    Cel,
    ClaimUri,
    IntOrString,
    ListMap,
    ListSet,
)
from rlhf_operator.api.object_store import ObjectStore
from rlhf_operator.api.pod_template import PodTemplate
from rlhf_trainer.config import Checkpoints

# torchrun reads PET_*, the others are what it sets for its workers: a user's value would split the process group.
RESERVED_ENV = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RESERVED_ENV_PREFIXES = ("PET_", "TORCHELASTIC_", "RLHF_")

Seconds = Annotated[int, Field(ge=1, le=31_536_000)]
Quantities = Annotated[
    dict[str, Annotated[int | str, IntOrString()]],
    Field(max_length=12),  # what CEL's cost budget lets the rule below check
    Cel(
        "self.all(k, size(k) <= 316 && isQuantity(string(self[k])))",
        "every value must be a Kubernetes quantity such as 2, 500m or 16Gi",
    ),
]


NOT_RESERVED = Cel(
    f"!(self.name in {list(RESERVED_ENV)!r})"
    + "".join(f" && !self.name.startsWith('{prefix}')" for prefix in RESERVED_ENV_PREFIXES),
    "PET_*, TORCHELASTIC_*, RLHF_*, MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK, LOCAL_RANK and "
    "LOCAL_WORLD_SIZE are set by the operator and torchrun: remove the variable",
    field_path=".name",
)


class EnvVar(ApiSpec):
    """One literal environment variable of the trainer container; for values from Secrets use podTemplate."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = Field(
        description="Not one that the operator or torchrun sets."
    )
    value: Annotated[str, Field(max_length=4096)] = Field("", description="Literal; nothing is expanded.")

    cel_rules: ClassVar[tuple[Cel, ...]] = (NOT_RESERVED,)


class ResourceRequirements(ApiSpec):
    """Of the main container of each pod; a missing request equals its limit."""

    limits: Quantities = Field(default_factory=dict, description="At most, by resource, e.g. nvidia.com/gpu: 8.")
    requests: Quantities = Field(default_factory=dict, description="Reserved, by resource.")


class TrainerSpec(ApiSpec):
    """The training pods: numNodes pods with numProcPerNode processes each, joined by torchrun."""

    num_nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Pods; each is one torchrun node.")
    num_proc_per_node: Annotated[
        int | str,
        IntOrString(),
        Cel(
            "type(self) == int ? (self >= 1 && self <= 64) : self == 'auto'",
            "must be a number from 1 to 64, or auto (the GPUs of one node, else 1)",
        ),
    ] = Field("auto", description="Processes per pod: a number, or auto for the GPUs of one node, else 1.")
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        None, description="Trainer image; default: the one the operator is configured with."
    )
    resources_per_node: ResourceRequirements = ResourceRequirements()
    env: Annotated[list[EnvVar], ListMap(("name",)), Field(max_length=64)] = Field(
        default_factory=list, description="Further environment variables of the trainer container."
    )
    pod_template: Annotated[dict[str, Any], PodTemplate(env=(NOT_RESERVED,))] = Field(
        default_factory=dict,
        description="A partial PodTemplateSpec merged over the generated one: maps by key, containers, volumes, "
        "volumeMounts and env by name; the container is called trainer. Changed while a job runs, it is refused "
        "(Accepted=False): suspend the job to change it.",
    )


class FailureAction(StrEnum):
    """FailJob ends the job; Restart counts towards maxRestarts; Ignore restarts without counting."""

    FAIL_JOB = "FailJob"
    RESTART = "Restart"
    IGNORE = "Ignore"


class FailureRule(ApiSpec):
    """Matches the earliest failure of an attempt; every list that is given must match, an empty one matches all."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?$", max_length=63)] = Field(
        description="Shown in the status when the rule decides."
    )
    on_exit_codes: Annotated[list[Annotated[int, Field(ge=1, le=255)]], ListSet(), Field(max_length=32)] = Field(
        default_factory=list, description="Any of these exit codes of the trainer container."
    )
    on_reasons: Annotated[list[Annotated[str, Field(max_length=128)]], ListSet(), Field(max_length=32)] = Field(
        default_factory=list, description="Failure classes (Unknown, Rendezvous, …) or reasons (OOMKilled, …)."
    )
    # Substrings and no regular expressions: a tenant's backtracking pattern would stall a shared operator.
    on_messages: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], ListSet(), Field(max_length=16)
    ] = Field(default_factory=list, description="Any of these texts occurs in the message.")
    action: FailureAction

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "(has(self.onExitCodes) && size(self.onExitCodes) > 0) || (has(self.onReasons) && size(self.onReasons) > 0)"
            " || (has(self.onMessages) && size(self.onMessages) > 0)",
            "a rule needs at least one of onExitCodes, onReasons and onMessages; change maxRestarts for all failures",
        ),
    )


class FailurePolicy(ApiSpec):
    """When a failed attempt is followed by another one."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        3, description="Counted restarts before the job fails; preemption and node loss are not counted."
    )
    rules: Annotated[list[FailureRule], ListMap(("name",)), Field(max_length=16)] = Field(
        default_factory=list, description="First match wins; without a match the exit class decides."
    )
    no_progress_seconds: Seconds = Field(600, description="Training without a finished step for this long is ended.")
    rendezvous_seconds: Seconds = Field(300, description="Time for all processes to find each other.")


class OnExceeded(StrEnum):
    SUSPEND = "Suspend"
    FAIL = "Fail"


class Budget(ApiSpec):
    """Cumulative over attempts, restarts and suspends."""

    gpu_hours: Annotated[float, Field(gt=0.0, le=100_000_000.0)] | None = Field(
        None, description="Hours of single accelerators: of all pods, from when the first has a node."
    )
    cost_usd: Annotated[float, Field(gt=0.0, le=1_000_000_000.0)] | None = Field(
        None, alias="costUSD", description="Refused (Accepted=False, NoPrice) unless the operator prices the resources."
    )
    on_exceeded: OnExceeded = Field(
        OnExceeded.SUSPEND, description="Suspend saves a checkpoint and waits for a larger budget; Fail ends the job."
    )

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel("has(self.gpuHours) || has(self.costUSD)", "a budget needs gpuHours, costUSD or both"),
    )


class Output(ApiSpec):
    """Where a run writes: into a folder of its own, <uri>/<uid of the job>."""

    uri: ClaimUri


class TrainingJobSpec(ApiSpec):
    """The part of the spec that does not say what is trained."""

    suspend: bool = Field(False, description="Saves a checkpoint, ends the pods and waits; false goes on from there.")
    trainer: TrainerSpec = TrainerSpec()
    object_store: ObjectStore | None = None
    checkpoints: Checkpoints = Checkpoints()
    output: Output
    failure_policy: FailurePolicy = FailurePolicy()
    pre_running_deadline_seconds: Seconds | None = Field(
        None, description="From admission of an attempt until all its pods are ready; then the job fails."
    )
    active_deadline_seconds: Seconds | None = Field(
        None, description="Time with a pod on a node, summed over attempts, without suspended time; then the job fails."
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = Field(
        None, description="The children of a finished job are deleted after this; the job itself never is."
    )
    budget: Budget | None = None


_IDLE = (
    "oldSelf.spec.suspend || !has(oldSelf.status) || !has(oldSelf.status.attempt) || oldSelf.status.attempt == 0"
    " || (has(oldSelf.status.phase) && oldSelf.status.phase == 'Suspended')"
)


def immutable(field: str, optional: bool = False) -> Cel:
    """A field of the spec that never changes: a new run is a new name."""
    same = f"self.spec.{field} == oldSelf.spec.{field}"
    if optional:
        same = f"has(self.spec.{field}) == has(oldSelf.spec.{field}) && (!has(self.spec.{field}) || {same})"
    return Cel(same, f"spec.{field} is immutable: a new run is a new name, create another job")


def editable_when_idle(field: str, optional: bool = False) -> Cel:
    """A field of the spec that may change while no pod runs."""
    same = f"self.spec.{field} == oldSelf.spec.{field}"
    if optional:
        same = f"(has(self.spec.{field}) == has(oldSelf.spec.{field}) && (!has(self.spec.{field}) || {same}))"
    return Cel(
        f"{_IDLE} || {same}",
        f"spec.{field} changes only while the job is suspended or before its first attempt: set spec.suspend first",
    )


TRAINING_JOB_RULES: tuple[Cel, ...] = (
    immutable("output"),
    editable_when_idle("trainer"),
    editable_when_idle("objectStore", optional=True),
    editable_when_idle("checkpoints"),
    editable_when_idle("failurePolicy"),
    editable_when_idle("preRunningDeadlineSeconds", optional=True),
    editable_when_idle("activeDeadlineSeconds", optional=True),
    editable_when_idle("budget", optional=True),
)
