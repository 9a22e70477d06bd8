"""The process of one rank: meet the others, check the inputs, train, evaluate, and say how it ended.

Started by torchrun, which the launcher starts. Whatever happens is written as this rank's Result; the launcher decides.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from transformers.utils import logging as transformers_logging

from rlhf_trainer.allocator import keep_freed_memory
from rlhf_trainer.attempt import read_config, status_port
from rlhf_trainer.distributed import World, join, leave
from rlhf_trainer.exits import EXIT_CODES, Ended, Invalid, classify
from rlhf_trainer.loops.common import Outcome, Session, StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.status import StatusBoard, StatusServer
from rlhf_trainer.wire import AttemptConfig, FailureClass, ReportPhase, Result, Verdict, VerdictState

log = logging.getLogger("rlhf_trainer")

# Imported when needed: a reward-model pod has no use for generation, and the import is part of the start-up time.
_LOOPS = {"RewardModelJob": "rlhf_trainer.loops.reward_model", "PolicyOptimizationJob": "rlhf_trainer.loops.policy"}


Loop = Callable[[Session], Outcome]


def load_loop(kind: str) -> Loop:
    loop: Loop = importlib.import_module(_LOOPS[kind]).run
    return loop


def run_attempt(config: AttemptConfig, loop: Loop, world: World, ranks: RankFiles, stop: StopSignal) -> Result:
    """Everything between the rendezvous and the result; never raises."""
    keep_freed_memory()
    board = StatusBoard(config.attempt, config.uid, world.size, _now)
    session: Session | None = None
    with StatusServer(board, status_port()) if world.is_main else nullcontext():
        try:
            if world.size != config.world_size:
                raise Invalid(
                    f"{world.size} ranks met, but the attempt is of {config.world_size}; "
                    "the pods disagree about numNodes or numProcPerNode",
                    reason="RendezvousMismatch",
                )
            session = Session(config, world, board, ranks, stop, _now)
            result = _finished(session, loop(session))
        except Exception as error:  # the boundary of the process: every error becomes a Result
            ended = classify(error)
            if ended is not error:
                log.exception("rank %d ended by an error", world.rank)
            result = _result(config, world.rank, ended, session)
        if session is not None:
            session.close(result)
        board.phase(ReportPhase.DONE)
    return result


def main() -> NoReturn:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()  # its report of the fresh reward head is not news
    transformers_logging.disable_progress_bar()
    ranks, stop = RankFiles.from_environment(), StopSignal()
    stop.install()
    ranks.started()
    config = read_config()  # the launcher has read it before: an error here is a bug worth its traceback
    loop = load_loop(config.kind)  # before the heartbeat begins: a cold disk is no hanging rank
    try:
        # Longer than the watchdog's limit, which names the culprit; a collective's own timeout only backs it up.
        world = join(timedelta(seconds=max(config.rendezvous_seconds, config.no_progress_seconds + 60)))
    except Ended as ended:
        _end(ranks, _result(config, ranks.rank, ended, None))
    ranks.joined()
    result = run_attempt(config, loop, world, ranks, stop)
    if result.failure_class is FailureClass.SUCCESS:
        leave()
    _end(ranks, result)


def _end(ranks: RankFiles, result: Result) -> NoReturn:
    ranks.ended(result)
    log.info("rank %d: %s: %s", ranks.rank, result.failure_class.value, result.message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result.exit_code)  # an orderly interpreter shutdown can hang in a process group that lost its peers


def _finished(session: Session, outcome: Outcome) -> Result:
    failed = [verdict for verdict in outcome.verdicts if verdict.state is not VerdictState.PASS]
    if failed:
        ending = Ended("; ".join(_say(verdict) for verdict in failed), outcome.gate_reason)
        ending.failure_class = FailureClass.GATE_FAILED
    else:
        judged = f"all {len(outcome.verdicts)} verdicts pass" if outcome.verdicts else "trained, and judged by nothing"
        ending = Ended(judged, "Succeeded")
        ending.failure_class = FailureClass.SUCCESS
    return _result(session.config, session.world.rank, ending, session).model_copy(
        update={
            "artifact": outcome.artifact,
            "verdicts": outcome.verdicts,
            "metrics": {**session.board.report.metrics, **outcome.metrics},
            "lineage": dict(outcome.lineage),
        }
    )


def _result(config: AttemptConfig, rank: int, ended: Ended, session: Session | None) -> Result:
    result = Result(
        failure_class=ended.failure_class,
        reason=ended.reason,
        message=ended.message,
        exit_code=int(EXIT_CODES[ended.failure_class]),
        attempt=config.attempt,
        uid=config.uid,
        rank=rank,
        finished_at=_now(),
        world_size=config.world_size,
    )
    if session is None:
        return result
    return result.model_copy(
        update={
            "step": session.done,
            "total_steps": session.board.report.total_steps,
            "checkpoint": session.last_checkpoint,
            "resumed_from": session.resumed_from,
            "skipped_checkpoints": session.skipped,
            "metrics": session.board.report.metrics,
            "verdicts": session.board.report.verdicts,
            "guardrails": session.board.report.guardrails,
        }
    )


def _say(verdict: Verdict) -> str:
    return f"{verdict.metric} {verdict.state.value}: {verdict.message}"


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
