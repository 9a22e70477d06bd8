"""The inputs of a run, resolved to places and digests; upstream jobs are waited for, and pinned once used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_operator.api.meta import ArtifactSource, Source
from rlhf_operator.kinds.base import Key, Object
from rlhf_operator.kinds.training.job import Input, Job
from rlhf_operator.kinds.training.objects import condition, integer, is_true, mapping, text
from rlhf_operator.kinds.training.reasons import Reason
from rlhf_operator.kinds.training.storage import BadUri, place_of

# Which kind of job a field's jobRef names.
UPSTREAM_KINDS = {
    "baseModel": "PolicyOptimizationJob",
    "policy": "PolicyOptimizationJob",
    "rewardModel": "RewardModelJob",
    "auditRewardModel": "RewardModelJob",
    "teacher": "PolicyOptimizationJob",
}


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


def references(primary: Object) -> frozenset[Key]:
    """The upstream jobs that the spec names."""
    namespace = text(primary, "metadata", "namespace")
    named = {field: text(primary, "spec", field, "jobRef", "name") for field in UPSTREAM_KINDS}
    return frozenset(Key(UPSTREAM_KINDS[field], namespace, name) for field, name in named.items() if name)


def resolve(job: Job[Any]) -> Resolution:
    """Inputs by lineage name. What an earlier attempt used stays: a changed digest under its name is an error."""
    inputs: dict[str, Input] = {}
    try:
        for name, source in job.kind.inputs(job.spec).items():
            inputs[name] = _resolve(job, name, source)
            place_of(inputs[name].uri)
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
    key = Key(UPSTREAM_KINDS[name], job.namespace, source.job_ref.name)
    upstream = job.related(key)
    validated = upstream is not None and is_true(upstream, "Validated")
    uri, digest = text(upstream, "status", "artifact", "uri"), text(upstream, "status", "artifact", "digest")
    if pinned is not None:
        if validated and digest and digest != pinned.digest:
            raise _Refused(
                Reason.DIGEST_MISMATCH,
                f"spec.{name}: {key.kind} {key.name} now holds {digest}, but this run began with "
                f"{pinned.digest}; create another job for the new one",
            )
        return Input(pinned.uri, pinned.digest)
    if not validated or not uri or not digest:
        raise _Waiting(f"spec.{name} waits for {_why_not(key, upstream, job)}")
    return Input(uri, digest)


def _why_not(key: Key, upstream: Object | None, job: Job[Any]) -> str:
    what = f"{key.kind} {key.name}"
    if upstream is None:
        return f"{what}, which does not exist"
    if is_true(upstream, "Failed"):
        reason = text(condition(upstream, "Failed"), "reason")
        return f"{what}, which failed ({reason}): waive its gate by a Decision, or create another job"
    if is_true(upstream, "Complete"):
        why = text(condition(upstream, "Validated"), "message")
        return f"{what}, which completed without being Validated: {why}"
    me = Key(job.kind.kind, job.namespace, job.name)
    if me in references(upstream) and not integer(upstream, "status", "attempt"):
        return (
            f"{what}, which waits for {me.kind} {me.name} in turn, so neither will begin: create one of them anew with "
            "a uri and its digest in place of jobRef"
        )
    return f"{what} to be Validated; it is {text(upstream, 'status', 'phase') or 'Pending'}"


def _check_audit(job: Job[Any], inputs: Mapping[str, Input]) -> None:
    """An audit must not share the weights, nor the preferences, of what trains the policy."""
    reward, audit = inputs.get("rewardModel"), inputs.get("auditRewardModel")
    if audit is None:
        return
    if reward is not None and reward.digest == audit.digest:
        message = f"auditRewardModel and rewardModel are the same model, {reward.digest}: name another one"
        raise _Refused(Reason.INVALID_DATA, message)
    learned = _preferences_of_job(job, "auditRewardModel")
    for name, preferences in _preferences_of_policy(job, inputs).items():
        if learned and learned == preferences:
            message = (
                f"auditRewardModel was trained on the same preferences as {name}, {learned}: "
                "another seed shares their mistakes; train it on other data"
            )
            raise _Refused(Reason.INVALID_DATA, message)


def _preferences_of_policy(job: Job[Any], inputs: Mapping[str, Input]) -> Mapping[str, str]:
    """The digests of what people preferred, by whom learns from it: the reward model, or the policy itself."""
    own = inputs.get("preferences")
    return {
        "rewardModel": _preferences_of_job(job, "rewardModel"),
        "this policy": "" if own is None else own.digest,
    }


def _preferences_of_job(job: Job[Any], name: str) -> str:
    source = mapping(job.observed.primary, "spec", name)
    upstream = job.related(Key(UPSTREAM_KINDS[name], job.namespace, text(source, "jobRef", "name")))
    return text(upstream, "status", "lineage", "preferences")
