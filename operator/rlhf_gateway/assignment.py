"""Which arm a conversation belongs to: a pure function, so that replicas agree without talking.

A conversation has one fixed position in [0, 1), the sha256 of the rollout's salt and its key. It belongs to the canary
exactly while its position lies below the canary's weight. What follows from that:

* The share of the canary is its weight, to a fraction of a percent, whatever the number of replicas or pods.
* It is symmetric: neither arm is stickier than the other, so the split does not drift as conversations return.
* Under one salt, growing the weight only adds conversations to the canary; no conversation that was on it leaves,
  until a rollback sets the weight to 0 and all of them leave at once.
* A new stage or candidate brings a new salt, and so an independent draw: what people who come back do in one stage is
  fresh evidence in the next, and no one is the guinea pig of every release.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Literal, NamedTuple

from rlhf_gateway.wire import Arm, ConversationKey

Unit = Literal["header", "user", "request"]
_RESOLUTION = 1 << 53  # every multiple of 2**-53 in [0, 1) is a float


class Conversation(NamedTuple):
    """What requests are grouped by. `unit` says what named it; a lone request is a conversation of its own."""

    key: str
    unit: Unit


def position(salt: str, key: str) -> float:
    """The conversation's place in [0, 1): uniform over keys, independent between salts."""
    digest = hashlib.sha256(f"{len(salt)}:{salt}{key}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / _RESOLUTION


def arm_of(salt: str, key: str, canary_weight_percent: float) -> Arm:
    """The arm of a conversation at this weight, 0 to 100 percent."""
    return "canary" if position(salt, key) < canary_weight_percent / 100.0 else "stable"


def conversation_of(headers: Mapping[str, str], body: bytes, key: ConversationKey) -> Conversation:
    """Find what names the conversation: the header, else (if so configured) the body's `user`, else nothing does."""
    named = headers.get(key.header, "").strip()
    if named:
        return Conversation(f"header:{named}", "header")
    if key.otherwise == "user" and (user := _user(body)):
        return Conversation(f"user:{user}", "user")
    return Conversation(f"request:{uuid.uuid4().hex}", "request")


def _user(body: bytes) -> str:
    if b'"user"' not in body:  # spares parsing what cannot name one
        return ""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):  # the backend is the one to refuse it
        return ""
    user = parsed.get("user") if isinstance(parsed, dict) else None
    return user.strip() if isinstance(user, str) else ""
