"""kopf's persistence, switched off.

Only low-level handlers are registered, which need none, but kopf computes the essence and a diff of every event all
the same, copying the whole body: most of an event's cost. With these nothing is computed, and nothing can ever be
written to an annotation or a status of a user's object.
"""

from __future__ import annotations

from typing import Any

import kopf


class NoDiffBase(kopf.DiffBaseStorage):
    """Sees nothing, remembers nothing."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class NoProgress(kopf.ProgressStorage):
    """There is no progress of handlers to keep: the state is in the objects' own status."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence
