"""The inputs of a run, resolved to places and digests; upstream jobs are waited for, and pinned once used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.kinds.base import Key, Object
from rlhf_operator.kinds.training.job import Input, Job
from rlhf_operator.kinds.training.objects import condition, is_true, mapping, text
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.storage import BadUri, Volume

UPSTREAM_KIND = "RewardModelJob"


@dataclass(frozen=True)
class Resolution:
    """Either all inputs, or why there is nothing to start with."""

    inputs: Mapping[str, Input] = field(default_factory=dict)
    waiting: str = ""
    refused: tuple[Reason, str] | None = None


class _Waiting(Exception):
    pass


class _Refused(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def references(primary: Object, fields: tuple[str, ...]) -> frozenset[Key]:
    """The upstream jobs that these fields of the spec name."""
    namespace = text(primary, "metadata", "namespace")
    names = (text(primary, "spec", name, "jobRef", "name") for name in fields)
    return frozenset(Key(UPSTREAM_KIND, namespace, name) for name in names if name)


def resolve(job: Job[Any]) -> Resolution:
    """Inputs by lineage name. What an earlier attempt used stays: a changed digest under its name is an error."""
    inputs: dict[str, Input] = {}
    try:
        for name, source in job.kind.inputs(job.spec).items():
            inputs[name] = _resolve(job, name, source)
            Volume.parse(inputs[name].uri)
        _check_audit(job, inputs)
    except _Waiting as waiting:
        return Resolution(waiting=str(waiting))
    except _Refused as refused:
        return Resolution(refused=(refused.reason, str(refused)))
    except BadUri as bad:
        return Resolution(refused=(Reason.INVALID_DATA, str(bad)))
    return Resolution(inputs=inputs)


def _resolve(job: Job[Any], name: str, source: Source | ArtifactSource) -> Input:
    if source.uri is not None and source.digest is not None:
        return Input(source.uri, source.digest)
    if not isinstance(source, ArtifactSource) or source.job_ref is None:
        raise _Refused(Reason.INVALID_DATA, f"spec.{name} names neither a job nor a uri with its digest")
    pinned = job.status.inputs.get(name)
    upstream = job.related(Key(UPSTREAM_KIND, job.namespace, source.job_ref.name))
    validated = upstream is not None and is_true(upstream, "Validated")
    uri, digest = text(upstream, "status", "artifact", "uri"), text(upstream, "status", "artifact", "digest")
    if pinned is not None:
        if validated and digest and digest != pinned.digest:
            raise _Refused(
                Reason.DIGEST_MISMATCH,
                f"spec.{name}: {UPSTREAM_KIND} {source.job_ref.name} now holds {digest}, but this run began with "
                f"{pinned.digest}; create another job for the new one",
            )
        return Input(pinned.uri, pinned.digest)
    if not validated or not uri or not digest:
        raise _Waiting(f"spec.{name} waits for {_why_not(source.job_ref.name, upstream)}")
    return Input(uri, digest)


def _why_not(name: str, upstream: Object | None) -> str:
    what = f"{UPSTREAM_KIND} {name}"
    if upstream is None:
        return f"{what}, which does not exist"
    if is_true(upstream, "Failed"):
        reason = text(condition(upstream, "Failed"), "reason")
        return f"{what}, which failed ({reason}): waive its gate by a Decision, or create another job"
    return f"{what} to be Validated; it is {text(upstream, 'status', 'phase') or 'Pending'}"


def _check_audit(job: Job[Any], inputs: Mapping[str, Input]) -> None:
    """An audit must not share the weights, nor the preferences, of the reward model that trains the policy."""
    reward, audit = inputs.get("rewardModel"), inputs.get("auditRewardModel")
    if reward is None or audit is None:
        return
    if reward.digest == audit.digest:
        message = f"auditRewardModel and rewardModel are the same model, {reward.digest}: name another one"
        raise _Refused(Reason.INVALID_DATA, message)
    preferences = {_preferences(job, name) for name in ("rewardModel", "auditRewardModel")}
    if len(preferences) == 1 and preferences != {""}:
        message = (
            f"auditRewardModel was trained on the same preferences as rewardModel, {preferences.pop()}: "
            "another seed shares their mistakes; train it on other data"
        )
        raise _Refused(Reason.INVALID_DATA, message)


def _preferences(job: Job[Any], name: str) -> str:
    source = mapping(job.observed.primary, "spec", name)
    upstream = job.related(Key(UPSTREAM_KIND, job.namespace, text(source, "jobRef", "name")))
    return text(upstream, "status", "lineage", "preferences")
