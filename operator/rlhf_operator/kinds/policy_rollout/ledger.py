"""The ledger of revisions: what is stable, what is tried, what was refused and why. Pure functions over a list."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from rlhf_operator.api.meta import ClaimSource
from rlhf_operator.api.policy_rollout_status import MAX_REVISIONS_KEPT, Revision, RevisionState, RolloutReason

Revisions = tuple[Revision, ...]
_DIGITS = 10  # of the digest in a revision's name

# What may be forgotten, and in which order.
_DISPOSABLE = {
    RevisionState.RETIRED: 0,
    RevisionState.SUPERSEDED: 0,
    RevisionState.REJECTED: 1,
    RevisionState.RETAINED: 2,
}


def revision_name(rollout: str, digest: str) -> str:
    """Of its Deployment and Service: the same digest is the same loaded model, whatever its role."""
    return f"{rollout}-{digest.removeprefix('sha256:')[:_DIGITS]}"


def stable(revisions: Revisions) -> Revision | None:
    return _first(revisions, RevisionState.STABLE)


def candidate(revisions: Revisions) -> Revision | None:
    return _first(revisions, RevisionState.CANDIDATE)


def retained(revisions: Revisions) -> Revisions:
    return tuple(entry for entry in revisions if entry.state is RevisionState.RETAINED)


def rejection(revisions: Revisions, digest: str) -> Revision | None:
    """The entry that refuses this digest."""
    return next((e for e in reversed(revisions) if e.digest == digest and e.state is RevisionState.REJECTED), None)


def started(
    revisions: Revisions, rollout: str, source: ClaimSource, state: RevisionState, image: str, trial: int, now: datetime
) -> Revisions:
    """With a new revision at the end; an older entry of the same digest that is still loaded gives way to it."""
    entry = Revision(
        revision=revision_name(rollout, source.digest),
        digest=source.digest,
        uri=source.uri,
        state=state,
        image=_loaded_image(revisions, source.digest) or image,
        trial=trial,
        started_at=now,
        reason=RolloutReason.FIRST_REVISION if state is RevisionState.STABLE else None,
    )
    rest = tuple(
        changed(e, state=RevisionState.RETIRED, finished_at=now)
        if e.digest == source.digest and e.state is RevisionState.RETAINED
        else e
        for e in revisions
    )
    return bounded((*rest, entry))


def _loaded_image(revisions: Revisions, digest: str) -> str | None:
    return next((e.image for e in retained(revisions) if e.digest == digest), None)


def ended(
    revisions: Revisions, entry: Revision, state: RevisionState, reason: RolloutReason, message: str, now: datetime
) -> Revisions:
    """With one revision out of the game."""
    done = changed(entry, state=state, reason=reason, message=message[:1024], finished_at=now)
    return replaced(revisions, entry, done)


def promoted(revisions: Revisions, entry: Revision, retain: timedelta, now: datetime) -> Revisions:
    """With the candidate as stable; the former stable stays loaded for a while."""
    former = stable(revisions)
    if former is not None:
        kept = changed(former, state=RevisionState.RETAINED, retained_until=now + retain, finished_at=now)
        revisions = replaced(revisions, former, kept)
    done = changed(entry, state=RevisionState.STABLE, reason=RolloutReason.PROMOTED, message=None, finished_at=now)
    return replaced(revisions, entry, done)


def expired(revisions: Revisions, now: datetime) -> Revisions:
    """With former stables retired whose time is over."""
    return tuple(
        changed(entry, state=RevisionState.RETIRED)
        if entry.state is RevisionState.RETAINED and entry.retained_until is not None and entry.retained_until <= now
        else entry
        for entry in revisions
    )


def forgiven(revisions: Revisions, desired: str) -> Revisions:
    """With rejections lifted that only hold until the spec moves on: all but those that evidence led to."""
    return tuple(
        changed(entry, state=RevisionState.RETIRED)
        if entry.state is RevisionState.REJECTED
        and entry.digest != desired
        and entry.reason != RolloutReason.GUARDRAIL_CROSSED
        else entry
        for entry in revisions
    )


def located(revisions: Revisions, source: ClaimSource) -> Revisions:
    """With the place at which the spec names the policy now: it may have been wrong, or the policy has moved."""
    return tuple(
        changed(entry, uri=source.uri)
        if entry.digest == source.digest
        and entry.state in (RevisionState.STABLE, RevisionState.CANDIDATE)
        and entry.uri != source.uri
        else entry
        for entry in revisions
    )


def replaced(revisions: Revisions, old: Revision, new: Revision) -> Revisions:
    return tuple(new if entry is old else entry for entry in revisions)


def changed(entry: Revision, **changes: object) -> Revision:
    return entry.model_copy(update=changes)


def bounded(revisions: Revisions) -> Revisions:
    """Without the oldest entries beyond the bound that nothing is routed to: ended ones, then refused digests, which
    still refuse, and last of all former stables, which are then unloaded before their time."""
    excess = len(revisions) - MAX_REVISIONS_KEPT
    if excess <= 0:
        return revisions
    disposable: Iterable[Revision] = sorted(
        (entry for entry in revisions if entry.state in _DISPOSABLE),
        key=lambda entry: (_DISPOSABLE[entry.state], entry.started_at),
    )
    gone = list(disposable)[:excess]
    return tuple(entry for entry in revisions if not any(entry is other for other in gone))


def _first(revisions: Revisions, state: RevisionState) -> Revision | None:
    return next((entry for entry in revisions if entry.state is state), None)
