"""Who may read the evidence: the operator's ServiceAccount, proven by a TokenReview."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Literal, Protocol

from rlhf_gateway.kube import ApiError

Ruling = Literal["allowed", "unauthenticated", "forbidden", "unavailable"]
GOOD_SECONDS = 60.0  # a revoked token is honoured for so long
BAD_SECONDS = 5.0
MAX_CACHED = 256


class Reviewer(Protocol):
    async def review_token(self, token: str) -> str | None: ...


class Guard:
    """Rules on bearer tokens, with a small cache keyed by their hash (tokens are not kept)."""

    def __init__(self, reviewer: Reviewer, username: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._reviewer = reviewer
        self._username = username
        self._clock = clock
        self._cache: dict[bytes, tuple[float, Ruling]] = {}

    async def rule(self, authorization: str | None) -> Ruling:
        """Rule on an Authorization header."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return "unauthenticated"
        key = hashlib.sha256(token.strip().encode("utf-8", "surrogatepass")).digest()
        until, ruling = self._cache.get(key, (0.0, "unauthenticated"))
        if self._clock() < until:
            return ruling
        try:
            username = await self._reviewer.review_token(token.strip())
        except ApiError:
            return "unavailable"
        ruling = self._judge(username)
        self._remember(key, ruling)
        return ruling

    def _judge(self, username: str | None) -> Ruling:
        if username is None:
            return "unauthenticated"
        return "allowed" if username == self._username else "forbidden"

    def _remember(self, key: bytes, ruling: Ruling) -> None:
        if len(self._cache) >= MAX_CACHED:
            self._cache.pop(next(iter(self._cache)))
        self._cache.pop(key, None)
        self._cache[key] = (self._clock() + (GOOD_SECONDS if ruling == "allowed" else BAD_SECONDS), ruling)
