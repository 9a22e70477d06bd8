"""What crosses the wire between the operator and a rollout's gateway. No I/O.

    operator --GatewayConfig (one key, gateway.json, of the rollout's ConfigMap, read through the API)--> gateway
    gateway  --Evidence (GET /evidence, admin port, operator's token)--------------------------> operator
    gateway  --DataPlaneState (GET /state, admin port)------------------------------------------> operator

Counts are cumulative per (stage, arm, revision) since the process started; `epoch` changes when it restarts, so a
reader folds differences and never counts anything twice.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

CONFIG_KEY = "gateway.json"
TRAFFIC_PORT = 8000
ADMIN_PORT = 8001
METRICS_PORT = 9090
SERVE_PORT = 8000  # a policy server's port

Arm = Literal["stable", "canary"]


class Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


class Backend(Wire):
    """One revision's Service."""

    revision: str  # short name of the revision, as in its Deployment
    digest: str
    url: str  # http://<service>.<namespace>.svc:8000


class ConversationKey(Wire):
    header: str = "X-Conversation-Id"
    otherwise: Literal["user", "request"] = "user"


class GatewayConfig(Wire):
    """Desired state of the split. `generation` grows with every write and is echoed by /state."""

    generation: int
    rollout: str
    salt: str  # the rollout's uid plus the candidate's digest: a new candidate redraws the assignment
    stage: int
    stable: Backend | None = None
    canary: Backend | None = None
    canary_weight_percent: float = Field(0.0, ge=0.0, le=100.0)
    shadow: bool = False
    fallback_on_safety_hit: bool = False
    conversation_key: ConversationKey = ConversationKey()


class ArmCounts(Wire):
    """Cumulative counts of one arm in one stage. The unit of judgement is the conversation: each conversation is
    counted once, and bad if any of its requests was bad (at its first bad request)."""

    stage: int
    arm: Arm
    revision: str
    shadow: bool = False
    requests: int = 0
    failures: int = 0  # answers the user did not get: connection error, 5xx, timeout
    violations: int = 0  # answers the safety filter tripped on
    harmful_served: int = 0  # tripped answers that reached a user (not re-answered, not shadow)
    conversations: int = 0
    failed_conversations: int = 0
    violating_conversations: int = 0
    # latency of whole answers: counts per bucket, upper bounds in milliseconds in Evidence.latency_bounds_ms
    latency_buckets: tuple[int, ...] = ()
    latency_conversation_buckets: tuple[int, ...] = ()  # one per conversation: its first request


class Evidence(Wire):
    pod_uid: str
    epoch: str
    generation: int
    latency_bounds_ms: tuple[float, ...]
    counts: tuple[ArmCounts, ...]


class DataPlaneState(Wire):
    """What this gateway pod really does now: the operator programs against this, not against its own hopes."""

    pod_uid: str
    epoch: str
    generation: int  # newest GatewayConfig in force
    canary_weight_percent: float
    ejected: tuple[str, ...] = ()  # revisions without a live endpoint, as this pod sees them
