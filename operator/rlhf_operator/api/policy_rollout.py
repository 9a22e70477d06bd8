"""PolicyRollout: a finished policy in, a served policy out, step by step and on evidence."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_operator.api.meta import (
    NAME_RULE,
    ApiSpec,
    Cel,
    ClaimArtifactSource,
    ClaimSource,
    Form,
    ListMap,
    PreserveUnknown,
)
from rlhf_operator.api.pod_template import PodTemplate
from rlhf_operator.api.policy_rollout_status import MAX_STAGES, PolicyRolloutStatus, RolloutMetric
from rlhf_operator.api.training import ResourceRequirements

Duration = Annotated[
    str,
    Field(pattern=r"^([0-9]{1,6}(ms|s|m|h))+$", max_length=32, description="A duration such as 30s, 10m or 1h30m."),
    Form("must be a duration such as 500ms, 30s, 10m or 1h30m"),
]
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float:
    """Seconds of a Duration; 0 for text that is none (the API server refuses it before)."""
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)(ms|s|m|h)", duration))


class ServingEngine(StrEnum):
    """builtin: the policy server of the trainer image; vllm: vllm serve; custom: a server of your own."""

    BUILTIN = "builtin"
    VLLM = "vllm"
    CUSTOM = "custom"


Arguments = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=64)]


class Serving(ApiSpec):
    """The policy server pods of one revision."""

    engine: ServingEngine = Field(
        ServingEngine.BUILTIN,
        description="builtin: the policy server of the trainer image; vllm: vllm serve; custom: any server that speaks "
        "the OpenAI API on port 8000 and answers GET /health with 200 once it is ready.",
    )
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        None, description="Of vllm and custom, best by digest; a change rolls through the pods of every revision."
    )
    command: Arguments = Field(
        default_factory=list, description="Of custom; none: the image's own. Expanded as args are."
    )
    args: Arguments = Field(
        default_factory=list,
        description="Further ones of vllm serve, or those of custom. $(RLHF_MODEL_PATH), $(RLHF_SERVED_NAME) and "
        "$(RLHF_MODEL_DIGEST) stand for the folder of the policy, the name clients ask for, and the folder's digest.",
    )
    replicas: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="Pods of the stable revision.")
    canary_replicas: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Pods of a candidate; it is scaled to replicas before it is promoted."
    )
    resources: ResourceRequirements = Field(
        ResourceRequirements(), description="Of each policy server, over the request of 200m CPU."
    )
    pod_template: Annotated[dict[str, Any], PodTemplate()] = Field(
        default_factory=dict,
        description="A partial PodTemplateSpec merged over the generated one; the container is called policy-server.",
    )

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "has(self.image) == (has(self.engine) && self.engine != 'builtin')",
            "the engines vllm and custom need an image, and builtin has the trainer's: name both or neither",
        ),
        Cel(
            "!has(self.command) || size(self.command) == 0 || (has(self.engine) && self.engine == 'custom')",
            "command is of the engine custom alone: vllm serve takes args",
        ),
        Cel(
            "!has(self.args) || size(self.args) == 0 || (has(self.engine) && self.engine != 'builtin')",
            "args are of the engines vllm and custom alone: builtin takes none",
        ),
    )


class ConversationKeySpec(ApiSpec):
    """What makes requests one conversation: conversations, not requests, are assigned and counted."""

    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$", min_length=1, max_length=64)] = Field(
        "X-Conversation-Id", description="HTTP header that names the conversation."
    )
    otherwise: Literal["user", "request"] = Field(
        "user", description="Without the header: the request's user field, else the request is a conversation."
    )


class Routing(ApiSpec):
    """The gateway in front of stable and canary."""

    provider: Literal["gateway"] = Field("gateway", description="A traffic splitter that the operator runs.")
    replicas: Annotated[int, Field(ge=1, le=10)] = Field(
        1, description="Gateway pods; a conversation that reaches two of them is counted by both."
    )
    resources: ResourceRequirements = Field(
        ResourceRequirements(), description="Of each gateway pod, over the requests of 200m CPU and 128Mi memory."
    )
    conversation_key: Annotated[
        ConversationKeySpec,
        Cel("self == oldSelf", "conversationKey is immutable: a change would redraw every conversation's arm"),
    ] = ConversationKeySpec()


class StageApproval(StrEnum):
    REQUIRED = "Required"


class Stage(ApiSpec):
    """One step of the ramp. It ends when it has its samples and its duration, no guardrail is failed or unknown, and
    its approval is given."""

    weight_percent: Annotated[float, Field(ge=0.0, le=99.0)] = Field(
        description="Share of conversations on the candidate, in percent; fractions such as 0.5 work."
    )
    shadow: bool = Field(
        False,
        description="Every prompt also goes to the candidate; its answers reach no user. The stage is not left while "
        "safety or availability look worse and are undecided.",
    )
    min_samples: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        200, description="Candidate conversations counted in this stage before it can end."
    )
    min_duration: Duration | None = Field(None, description="Time at this weight before the stage can end.")
    approval: StageApproval | None = Field(
        None, description="Required: the stage ends only with a Decision Approve for its number and digest."
    )

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "(has(self.shadow) && self.shadow) == (self.weightPercent == 0.0)",
            "a shadow stage has weightPercent 0, and weightPercent 0 gathers evidence only with shadow: true",
        ),
    )


class Guardrail(ApiSpec):
    """A comparison with stable, judged on conversations. It fails when the candidate is shown to be worse, and passes
    when it is shown to be worse by less than the margin; a promotion needs every guardrail to pass."""

    metric: RolloutMetric
    against: Literal["stable"] = Field("stable", description="The revision that is serving, in the same stage.")
    margin: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        description="Tolerated excess over stable: of the share of conversations with a violation, of those with a "
        "failed answer, or of those slower than stable's concurrent 95th percentile."
    )
    alpha: Annotated[float, Field(gt=0.0, le=0.1)] = Field(
        0.01, description="Probability of a wrong Fail over the whole trial, and of a wrong Pass."
    )
    limit: Duration | None = Field(
        None,
        description="Of latencyP95: what users were promised. An answer within it is never slow, whatever stable does; "
        "it is taken up to the next bound of the gateway's histogram.",
    )

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "!has(self.limit) || self.metric == 'latencyP95'",
            "limit is a time, of the guardrail latencyP95 alone: use margin, or remove it",
        ),
    )


class BlindAction(StrEnum):
    HOLD = "Hold"
    ROLLBACK = "Rollback"


class OnBlind(ApiSpec):
    """While the evidence cannot be read nothing advances; after maxDuration the action is taken."""

    max_duration: Duration = Field("10m", description="Blind for longer than this, the action is taken.")
    action: BlindAction = Field(
        BlindAction.HOLD, description="Hold keeps the weight and sets Degraded; Rollback takes the candidate out."
    )


class RollbackMode(StrEnum):
    DRAIN = "drain"
    SEVER = "sever"


class Rollback(ApiSpec):
    """How the candidate leaves, and how long the former stable stays at hand."""

    mode: RollbackMode = Field(
        RollbackMode.DRAIN, description="Answers in flight on the candidate are finished (drain) or cut (sever)."
    )
    retain_stable: Duration = Field("1h", description="The former stable stays loaded for this long after a promotion.")


class Fallback(ApiSpec):
    """Who answers instead of a candidate."""

    on_safety_hit: Literal["stable"] | None = Field(
        None, description="stable: an answer of the candidate that trips the safety filter is given by stable instead."
    )


class PolicyRolloutSpec(ApiSpec):
    policy: ClaimArtifactSource
    serving: Serving = Serving()
    routing: Routing = Routing()
    safety_filter: ClaimSource | None = Field(
        None, description="A trained safety filter (fileDigest); without one safety is Unknown, never assumed."
    )
    stages: Annotated[list[Stage], Field(min_length=1, max_length=MAX_STAGES)] = Field(
        description="The ramp, in order; after the last one the candidate is promoted."
    )
    guardrails: Annotated[list[Guardrail], ListMap(("metric",)), Field(min_length=1, max_length=8)] = Field(
        description="What the candidate must not be worse in."
    )
    on_blind: OnBlind = OnBlind()
    rollback: Rollback = Rollback()
    fallback: Fallback = Fallback()
    paused: bool = Field(False, description="Holds the ramp where it is; rollbacks still happen.")

    cel_rules: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "self.stages.map(s, s.weightPercent).isSorted()",
            "stages must have ascending weightPercent: a ramp goes up, the rollback goes to 0 by itself",
        ),
        Cel(
            "self.stages.exists(s, s.weightPercent > 0.0)",
            "stages need one with weightPercent above 0: shadow answers alone say nothing about real traffic",
        ),
        Cel(
            "has(self.safetyFilter) || !self.guardrails.exists(g, g.metric == 'safetyViolationRate')",
            "the guardrail safetyViolationRate needs safetyFilter: without a filter no answer is judged",
        ),
        Cel(
            "has(self.safetyFilter) || !has(self.fallback) || !has(self.fallback.onSafetyHit)",
            "fallback.onSafetyHit needs safetyFilter: without a filter there is no safety hit",
        ),
    )


class PolicyRollout(ApiSpec):
    """Serves a policy, and moves to a new one through shadowing and a weighted ramp under sequential tests."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["PolicyRollout"] = "PolicyRollout"
    metadata: Annotated[dict[str, Any], PreserveUnknown()] = Field(default_factory=dict)
    spec: PolicyRolloutSpec
    status: PolicyRolloutStatus | None = None

    cel_rules: ClassVar[tuple[Cel, ...]] = (NAME_RULE,)
