"""What crosses the wire between the operator and a rollout's gateway. No I/O.

    operator --GatewayConfig (one key, gateway.json, of the rollout's ConfigMap, read through the API)--> gateway
    gateway  --Evidence (GET /evidence, admin port, operator's token)--------------------------> operator
    gateway  --DataPlaneState (GET /state, admin port)------------------------------------------> operator

Counts are cumulative per (stage, arm, revision, shadow) since the process started; `epoch` changes when it restarts,
so a reader folds differences and never counts anything twice.

Safety is known only for answers that the safety filter judged: `judged` and `judged_conversations` are the exposures
behind `violations`. Without a filter they stay 0, which means Unknown, never "no violations".
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
# The operator shows gateways a token for this audience only: one of them that is malicious, or a pod that poses as
# one, gets nothing the API server would accept.
TOKEN_AUDIENCE = "rlhf-gateway"
TOKEN_PATH = "/var/run/secrets/rlhf.dev/gateway/token"  # of the operator, mounted by the chart
# A gateway pod goes on accepting while its endpoint is withdrawn, finishes what is in flight, and stays readable until
# its last counts were pulled: its pod needs this long between SIGTERM and SIGKILL.
TERMINATION_GRACE_SECONDS = 90
ARM_HEADER = "X-RLHF-Arm"  # response: the arm that answered
REVISION_HEADER = "X-RLHF-Revision"  # response: the revision that answered
FALLBACK_HEADER = "X-RLHF-Fallback"  # response: why stable answered: safety, failure, refused, ejected, severed

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


class SafetyFilter(Wire):
    """A trained filter (rlhf_trainer.safety) as the gateway sees it: a file on a mounted claim, its fileDigest."""

    path: str
    digest: str


class GatewayConfig(Wire):
    """Desired state of the split. `generation` grows with every write and is echoed by /state."""

    generation: int
    rollout: str
    salt: str  # the rollout's uid and the stage: each stage of each candidate draws the assignment anew
    stage: int
    stable: Backend | None = None
    canary: Backend | None = None
    canary_weight_percent: float = Field(0.0, ge=0.0, le=100.0)
    shadow: bool = False
    fallback_on_safety_hit: bool = False
    conversation_key: ConversationKey = ConversationKey()
    safety_filter: SafetyFilter | None = None  # None: nothing is judged, safety is Unknown
    # What happens to answers in flight on a revision that loses its traffic: they finish, or they are cut at once (and
    # answered by stable where nothing has been sent yet).
    rollback_mode: Literal["drain", "sever"] = "drain"


class ArmCounts(Wire):
    """Cumulative counts of one arm in one stage. The unit of judgement is the conversation: each conversation is
    counted once, and bad if any of its requests was bad (at its first bad request)."""

    stage: int
    arm: Arm
    revision: str
    shadow: bool = False
    requests: int = 0
    failures: int = 0  # answers this arm did not give: connection error, 5xx, timeout (re-answered by stable or not)
    diverted: int = 0  # requests of this arm that stable served because this arm was ejected; in no other count
    judged: int = 0  # answers the safety filter judged: the exposure behind violations; 0 means Unknown
    violations: int = 0  # answers the safety filter tripped on
    harmful_served: int = 0  # tripped answers that reached a user (not re-answered, not shadow)
    conversations: int = 0
    failed_conversations: int = 0
    judged_conversations: int = 0  # the exposure behind violating_conversations
    violating_conversations: int = 0
    # latency of whole answers: counts per bucket, upper bounds in milliseconds in Evidence.latency_bounds_ms
    latency_buckets: tuple[int, ...] = ()
    latency_conversation_buckets: tuple[int, ...] = ()  # one per conversation: its first request


class Evidence(Wire):
    pod_uid: str
    epoch: str
    generation: int
    latency_bounds_ms: tuple[float, ...]  # the buckets of ArmCounts have one more: above the last bound
    counts: tuple[ArmCounts, ...]
    units: dict[str, int] = {}  # requests by what named their conversation: header, user, request
    uncounted_conversations: int = 0  # requests left out because the memory of seen conversations was full


class DataPlaneState(Wire):
    """What this gateway pod really does now: the operator programs against this, not against its own hopes."""

    pod_uid: str
    epoch: str
    generation: int  # newest GatewayConfig in force
    canary_weight_percent: float
    ejected: tuple[str, ...] = ()  # revisions without a live endpoint, as this pod sees them
    in_flight: dict[str, int] = {}  # revision -> requests being answered: 0 means it may be scaled down
    safety_filter: str | None = None  # digest of the filter in use; None while there is none
    errors: tuple[str, ...] = ()  # what keeps this pod from doing what the newest configuration says
