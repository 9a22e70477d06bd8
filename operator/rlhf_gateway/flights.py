"""Requests being answered, per revision: how many, and a way to cut them (rollback mode sever)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SeveredError(Exception):
    """The revision lost its traffic while it was answering, and the rollback asked for a cut."""


class Flights:
    """Registry of the answers in flight. Lives on one event loop."""

    def __init__(self) -> None:
        self._scopes: dict[str, set[asyncio.Timeout]] = {}
        self._landed = asyncio.Event()

    def counts(self) -> dict[str, int]:
        """Revision -> answers in flight."""
        return {revision: len(scopes) for revision, scopes in self._scopes.items()}

    @asynccontextmanager
    async def enter(self, revision: str) -> AsyncIterator[None]:
        """Count the block as one answer of `revision`. Raises SeveredError from wherever it waits, if it is cut."""
        scope = asyncio.timeout(None)
        self._scopes.setdefault(revision, set()).add(scope)
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise SeveredError(f"revision {revision} was taken out of service") from None
            raise
        finally:
            self._scopes[revision].discard(scope)
            if not self._scopes[revision]:
                del self._scopes[revision]
            self._landed.set()

    def sever(self, revision: str) -> int:
        """Cut every answer of `revision` in flight; how many there were."""
        scopes = tuple(self._scopes.get(revision, ()))
        for scope in scopes:
            if not scope.expired():
                scope.reschedule(0.0)  # a deadline in the past: the block is left at once
        return len(scopes)

    async def quiet(self) -> None:
        """Wait until nothing is in flight."""
        while self._scopes:
            self._landed.clear()
            await self._landed.wait()
