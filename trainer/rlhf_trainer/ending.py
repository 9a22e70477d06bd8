"""How an attempt ended, from everything its launcher saw: a pure decision. No torch.

The class is that of the cause, not of its consequences: when one rank fails, the others report a broken collective or
are killed while they wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rlhf_trainer.checkpoint import CheckpointRefused, Found, published, read_manifest
from rlhf_trainer.exits import EXIT_CODES, Ended, OutOfMemory, Preempted, RendezvousFailed
from rlhf_trainer.ranks import RankState
from rlhf_trainer.wire import AttemptConfig, CheckpointRecord, FailureClass, Result

# What a rank reports merely because a peer was lost; any other ending of any rank explains more.
_CONSEQUENCES = {FailureClass.RENDEZVOUS, FailureClass.PREEMPTED, FailureClass.SUCCESS}


@dataclass(frozen=True)
class Observed:
    """Of the ranks on this node. ``intervention``: why the launcher itself ended them, if it did."""

    results: Mapping[int, Result] = field(default_factory=dict)
    states: Mapping[int, RankState] = field(default_factory=dict)
    intervention: Ended | None = None
    oom_killed: bool = False
    exit_code: int = 1


def decide(config: AttemptConfig | None, observed: Observed, now: datetime) -> Result:
    """The node's Result. ``config`` is None only when it could not be read."""
    results = sorted(observed.results.values(), key=lambda result: (result.finished_at, result.rank))
    causes = [result for result in results if result.failure_class not in _CONSEQUENCES]
    if causes:
        return causes[0]
    killed = sorted(set(observed.states) - set(observed.results))
    if killed and observed.oom_killed:
        return _compose(config, OutOfMemory(f"{_ranks(killed)} killed by the kernel: {_MEMORY_ADVICE}"), now)
    if observed.intervention is not None and type(observed.intervention) is not Ended:
        return _compose(config, observed.intervention, now)
    if killed:
        message = f"{_ranks(killed)} killed, or died while starting, and left no result; the log says which"
        return _compose(config, Ended(message), now)
    for consequence in (FailureClass.PREEMPTED, FailureClass.RENDEZVOUS):
        matching = [result for result in results if result.failure_class is consequence]
        if matching:
            return matching[0]
    if results:
        return min(results, key=lambda result: result.rank)
    message = f"torchrun ended with code {observed.exit_code} before any rank started; its output says why"
    return _compose(config, RendezvousFailed(message), now)


_MEMORY_ADVICE = (
    "out of memory; raise the pods' memory limit, lower training.microBatchSize or raise training.deepspeed.zeroStage"
)


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names} was" if len(ranks) == 1 else f"ranks {names} were"


def _compose(config: AttemptConfig | None, ended: Ended, now: datetime) -> Result:
    checkpoint = None if config is None else newest_checkpoint(config)
    if isinstance(ended, Preempted) and checkpoint is not None:
        ended = Preempted(f"{ended.message}; the newest checkpoint is of step {checkpoint.step}")
    return Result(
        failure_class=ended.failure_class,
        reason=ended.reason,
        message=ended.message,
        exit_code=int(EXIT_CODES[ended.failure_class]),
        attempt=0 if config is None else config.attempt,
        uid="" if config is None else config.uid,
        finished_at=now,
        step=0 if checkpoint is None else checkpoint.step,
        checkpoint=checkpoint,
    )


def newest_checkpoint(config: AttemptConfig) -> CheckpointRecord | None:
    """The furthest published checkpoint by its manifest alone: hashing gigabytes can wait for the resume."""
    for path in published(Path(config.output.path)):
        try:
            return Found(path, read_manifest(path)).record
        except CheckpointRefused:
            continue
    return None
