"""The safety filter in front of users: an interface, and the loader of the builtin one.

The builtin filter is the linear model that `python -m rlhf_trainer.safety train` writes; the format and the scorer live
in `rlhf_trainer.safety.scorer`, which needs numpy and nothing else. A filter that cannot be loaded, or is not the one
that was pinned, is no filter: safety is then Unknown, and the reason is in /state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rlhf_gateway.wire import SafetyFilter as FilterSource
from rlhf_trainer.digests import DigestMismatchError, check_digest, file_digest
from rlhf_trainer.safety.scorer import FormatError, LinearFilter

log = logging.getLogger(__name__)

_INLINE_CHARACTERS = 1000  # longer answers are scored on a thread: this many take some 4 ms of the event loop


class SafetyFilter(Protocol):
    """Judges what a policy said. Must be a pure function of the text."""

    def violates(self, text: str) -> bool: ...


class FilterError(Exception):
    """The filter cannot be used; the message says why and what to do."""


def load(source: FilterSource) -> SafetyFilter:
    """Read and verify a builtin filter. Raises FilterError."""
    try:
        check_digest(file_digest(source.path), source.digest, f"safety filter {source.path}")
        return LinearFilter.read(Path(source.path))
    except OSError as error:
        raise FilterError(f"safety filter {source.path} cannot be read ({error}): is its claim mounted?") from error
    except (DigestMismatchError, FormatError) as error:
        raise FilterError(str(error)) from error


class FilterSlot:
    """The filter in use. It follows the configuration, but never leaves users unprotected on the way: the old filter
    stays until the new one is loaded, and `digest` always names the one that judges."""

    def __init__(self, loader: Callable[[FilterSource], SafetyFilter] = load) -> None:
        self._loader = loader
        self._wanted: FilterSource | None = None
        self._filter: SafetyFilter | None = None
        self._digest: str | None = None
        self.error: str | None = None

    @property
    def digest(self) -> str | None:
        """Digest of the filter that judges now; None: nothing is judged."""
        return self._digest

    def needs(self, source: FilterSource | None) -> bool:
        """Whether `use(source)` would change or retry anything."""
        return (source.digest if source is not None else None) != self._digest

    async def use(self, source: FilterSource | None) -> None:
        """Switch to `source`; a failure leaves the old one in place and says why in `error`."""
        self._wanted, self.error = source, None
        if source is None:
            self._filter = self._digest = None
            return
        try:
            loaded = await asyncio.to_thread(self._loader, source)
        except FilterError as error:
            log.error("safety filter unusable: %s", error)
            if self._wanted == source:
                self.error = str(error)
            return
        if self._wanted == source:  # a newer configuration may have come while this one loaded
            self._filter, self._digest = loaded, source.digest

    async def judge(self, texts: tuple[str, ...]) -> bool | None:
        """True: at least one text violates. None: nothing to judge with, or nothing to judge."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self.judge_now(texts)
        return await asyncio.to_thread(self.judge_now, texts)

    def judge_now(self, texts: tuple[str, ...]) -> bool | None:
        """The same without waiting, for short answers."""
        current = self._filter
        if current is None or not texts:
            return None
        return any(current.violates(text) for text in texts)
