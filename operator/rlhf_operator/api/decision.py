"""Decision: what a person decided, as a small immutable object.

An annotation or a field would say that somebody approved; a Decision says who, what exactly, why and until when, and
is its own audit trail. The API server binds it to its author: the ValidatingAdmissionPolicy below refuses a `spec.by`
that is not the requesting user, and the operator honours no Decision while that policy is not in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from rlhf_operator.api.crd import PlainColumn, PlainResource
from rlhf_operator.api.labels import GROUP, VERSION
from rlhf_operator.api.meta import ApiSpec, Cel, Digest, Name

PLURAL = "decisions"
POLICY_NAME = f"{PLURAL}.{GROUP}"  # of the ValidatingAdmissionPolicy and of its binding
BY_IS_THE_USER = "object.spec.by == request.userInfo.username"


class SubjectKind(StrEnum):
    """Kind of the object decided about."""

    REWARD_MODEL_JOB = "RewardModelJob"
    POLICY_OPTIMIZATION_JOB = "PolicyOptimizationJob"
    POLICY_ROLLOUT = "PolicyRollout"


class Action(StrEnum):
    """What is decided.

    Approve lets a rollout pass one stage. SkipStage ends one without its samples, duration and approval; no guardrail
    is outvoted. Abort rolls its candidate back. ClearRejection lets a rejected digest try
    again. Acknowledge lets a job that a guardrail paused go on. Waive accepts an artifact that its gate refused.
    """

    APPROVE = "Approve"
    SKIP_STAGE = "SkipStage"
    ABORT = "Abort"
    CLEAR_REJECTION = "ClearRejection"
    ACKNOWLEDGE = "Acknowledge"
    WAIVE = "Waive"


class Subject(ApiSpec):
    """The object decided about, in the same namespace."""

    kind: SubjectKind
    name: Name


def _actions(*actions: Action) -> str:
    return "(self.action in [" + ", ".join(f"'{action}'" for action in actions) + "])"


_STAGE_ACTIONS = (Action.APPROVE, Action.SKIP_STAGE)
_ROLLOUT_ACTIONS = (*_STAGE_ACTIONS, Action.ABORT, Action.CLEAR_REJECTION)
_DIGEST_ACTIONS = (*_ROLLOUT_ACTIONS, Action.WAIVE)


class DecisionSpec(ApiSpec):
    subject: Subject
    action: Action
    digest: Digest | None = Field(
        None, description="Digest of the policy or artifact decided about: a decision never carries over to another."
    )
    stage: Annotated[int, Field(ge=0, le=63)] | None = Field(
        None, description="Approve and SkipStage: index of the stage of the rollout, counted from 0."
    )
    attempt: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Acknowledge: the attempt that was paused."
    )
    by: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="Who decides: your own user name as the API server knows it (kubectl auth whoami)."
    )
    reason: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="Why, for later readers.")
    expires_at: datetime | None = Field(None, description="Not honoured from this time on; default: never expires.")

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel("self == oldSelf", "a decision is immutable: create another one", reason="FieldValueForbidden"),
        Cel(
            f"{_actions(*_ROLLOUT_ACTIONS)} == (self.subject.kind == 'PolicyRollout')",
            "Approve, SkipStage, Abort and ClearRejection are about a PolicyRollout, Acknowledge and Waive about a "
            "job: change action or subject.kind",
            field_path=".action",
        ),
        Cel(
            f"!{_actions(*_DIGEST_ACTIONS)} || has(self.digest)",
            "Approve, SkipStage, Abort, ClearRejection and Waive need digest: the digest that was looked at "
            "(status of the subject shows it)",
            field_path=".digest",
            reason="FieldValueRequired",
        ),
        Cel(
            f"{_actions(*_STAGE_ACTIONS)} == has(self.stage)",
            "stage goes with Approve and SkipStage: set it to the index of that stage, or remove it",
            field_path=".stage",
        ),
        Cel(
            "(self.action == 'Acknowledge') == has(self.attempt)",
            "attempt goes with Acknowledge: set it to the paused attempt (status.attempt of the job), or remove it",
            field_path=".attempt",
        ),
    )


class Decision(ApiSpec):
    """A person's decision about one object: immutable, bound to the requesting user, kept as the audit trail."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["Decision"] = "Decision"
    metadata: Mapping[str, Any] = Field(default_factory=dict)
    spec: DecisionSpec

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", ""))

    def expired(self, now: datetime) -> bool:
        return self.spec.expires_at is not None and self.spec.expires_at <= now


def readable(decisions: Iterable[Mapping[str, Any]], now: datetime) -> tuple[Decision, ...]:
    """Those in force at `now`, in the given order. What an older operator cannot read it does not honour."""
    found = []
    for body in decisions:
        try:
            decision = Decision.model_validate(body)
        except ValidationError:
            continue
        if not decision.expired(now):
            found.append(decision)
    return tuple(found)


DECISION = PlainResource(
    model=Decision,
    kind="Decision",
    plural=PLURAL,
    singular="decision",
    short_names=("dec",),
    printer_columns=(
        PlainColumn("Action", "string", ".spec.action"),
        PlainColumn("Kind", "string", ".spec.subject.kind"),
        PlainColumn("Subject", "string", ".spec.subject.name"),
        PlainColumn("By", "string", ".spec.by"),
        PlainColumn("Stage", "integer", ".spec.stage", priority=1),
        PlainColumn("Attempt", "integer", ".spec.attempt", priority=1),
        PlainColumn("Expires", "string", ".spec.expiresAt", priority=1),
        PlainColumn("Reason", "string", ".spec.reason", priority=1),
    ),
)


def admission_policy() -> dict[str, Any]:
    """The policy that binds `spec.by` to the requesting user. An update needs none: the spec is immutable."""
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": POLICY_NAME},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "resourceRules": [
                    {
                        "apiGroups": [GROUP],
                        "apiVersions": [VERSION],
                        "operations": ["CREATE"],
                        "resources": [PLURAL],
                        "scope": "Namespaced",
                    }
                ]
            },
            "validations": [
                {
                    "expression": BY_IS_THE_USER,
                    "messageExpression": "'spec.by must be the user who creates the decision: set it to '"
                    " + request.userInfo.username",
                    "reason": "Forbidden",
                }
            ],
        },
    }


def admission_policy_binding() -> dict[str, Any]:
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": POLICY_NAME},
        "spec": {"policyName": POLICY_NAME, "validationActions": ["Deny"]},
    }


def enforced(policy: Mapping[str, Any] | None, binding: Mapping[str, Any] | None) -> bool:
    """Whether these live objects really bind every Decision to its author: existing is not enough.

    Whoever may edit them could else switch the check off by a selector or by auditing instead of denying, and
    every approval would be a claim.
    """
    if policy is None or binding is None:
        return False
    rules, bound = policy.get("spec", {}), binding.get("spec", {})
    constraints = rules.get("matchConstraints", {})
    return (
        rules.get("failurePolicy", "Fail") == "Fail"
        and not rules.get("matchConditions")
        and _unselective(constraints)
        and any(_covers_creation(rule) for rule in constraints.get("resourceRules", ()))
        and any(check.get("expression") == BY_IS_THE_USER for check in rules.get("validations", ()))
        and bound.get("policyName") == policy.get("metadata", {}).get("name")
        and "Deny" in bound.get("validationActions", ())
        and _unselective(bound.get("matchResources", {}))
        and not bound.get("matchResources", {}).get("resourceRules")
        and not bound.get("paramRef")  # a parameter that is not found may switch the binding off
    )


def _unselective(match: Mapping[str, Any]) -> bool:
    return not any(match.get(key) for key in ("namespaceSelector", "objectSelector", "excludeResourceRules"))


def _covers_creation(rule: Mapping[str, Any]) -> bool:
    def holds(key: str, value: str) -> bool:
        return bool({value, "*"} & set(rule.get(key, ())))

    return (
        holds("apiGroups", GROUP)
        and holds("apiVersions", VERSION)
        and holds("operations", "CREATE")
        and holds("resources", PLURAL)
        and rule.get("scope", "*") in ("*", "Namespaced")
        and not rule.get("resourceNames")
    )
