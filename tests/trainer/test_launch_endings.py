"""How an attempt ended is decided by its cause: the table of endings, and the counters and files behind it."""

from __future__ import annotations

import re
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_trainer.cgroup import memory_limit, oom_kills
from rlhf_trainer.config import PolicyTraining, RewardModelTraining
from rlhf_trainer.ending import Observed, decide
from rlhf_trainer.exits import EXIT_CODES, Diverged, NoProgress, Preempted, RendezvousFailed, classify
from rlhf_trainer.launch import Supervisor, wait_for_name
from rlhf_trainer.ranks import RankFiles, RankState, last_beat, read_results, read_states
from rlhf_trainer.report import main as report
from rlhf_trainer.wire import (
    TERMINATION_MESSAGE_LIMIT,
    ExitCode,
    FailureClass,
    Result,
    SkippedCheckpoint,
    Verdict,
    VerdictState,
)
from tests.trainer.training_world import TinyWorld

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def result_of(rank: int, failure_class: FailureClass, seconds: float = 0.0) -> Result:
    return Result(
        failure_class=failure_class,
        reason="R",
        message=f"rank {rank}",
        exit_code=int(EXIT_CODES[failure_class]),
        attempt=1,
        uid="u",
        rank=rank,
        finished_at=NOW + timedelta(seconds=seconds),
    )


def observed(*results: Result, ranks: int = 2, **changes: Any) -> Observed:
    states = {rank: RankState(rank=rank, pid=100 + rank, joined=True) for rank in range(ranks)}
    return Observed(results={result.rank: result for result in results}, states=states, **changes)


C = FailureClass


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (observed(result_of(0, C.SUCCESS), result_of(1, C.SUCCESS)), C.SUCCESS),
        (observed(result_of(0, C.GATE_FAILED), result_of(1, C.GATE_FAILED)), C.GATE_FAILED),
        (observed(result_of(0, C.RENDEZVOUS, 0), result_of(1, C.DIVERGED, 1)), C.DIVERGED),
        (observed(result_of(0, C.INVALID, 1), result_of(1, C.DIVERGED, 0)), C.DIVERGED),
        (observed(result_of(0, C.PREEMPTED), result_of(1, C.PREEMPTED)), C.PREEMPTED),
        (observed(result_of(0, C.RENDEZVOUS), result_of(1, C.RENDEZVOUS)), C.RENDEZVOUS),
        (observed(result_of(0, C.RENDEZVOUS)), C.UNKNOWN),
        (observed(result_of(0, C.RENDEZVOUS), oom_killed=True), C.OUT_OF_MEMORY),
        (observed(oom_killed=True, ranks=1), C.OUT_OF_MEMORY),
        (observed(intervention=NoProgress("hung")), C.NO_PROGRESS),
        (observed(intervention=RendezvousFailed("late")), C.RENDEZVOUS),
        (observed(intervention=Preempted("no time")), C.PREEMPTED),
        (observed(result_of(0, C.DIVERGED), intervention=NoProgress("hung")), C.DIVERGED),
        (observed(ranks=0), C.RENDEZVOUS),
    ],
)
def test_the_cause_outranks_its_consequences(seen: Observed, expected: FailureClass) -> None:
    decided = decide(None, seen, NOW)
    assert decided.failure_class is expected
    assert decided.exit_code == EXIT_CODES[expected]
    assert decided.message


def test_every_class_has_an_exit_code() -> None:
    assert set(EXIT_CODES) == set(FailureClass)
    assert EXIT_CODES[FailureClass.PREEMPTED] == ExitCode.PREEMPTED == 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Diverged("x"), C.DIVERGED),
        (MemoryError(), C.OUT_OF_MEMORY),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), C.RENDEZVOUS),
        (RuntimeError("index out of range"), C.UNKNOWN),
        (ValueError("gloo/ is only a word here"), C.UNKNOWN),
    ],
)
def test_exceptions_are_classified(error: Exception, expected: FailureClass) -> None:
    assert classify(error).failure_class is expected


def test_an_allocation_that_the_kernel_refuses_is_a_lack_of_memory() -> None:
    """Torch has no class of its own for it on the CPU."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55)
    assert classify(refused.value).failure_class is C.OUT_OF_MEMORY


def test_the_advice_of_an_attempt_without_memory_is_for_either_kind() -> None:
    """A policy has no globalBatchSize, and what a pass holds at once is microBatchSize."""
    killed = decide(None, observed(oom_killed=True, ranks=1), NOW).message
    for message in (killed, classify(MemoryError("no")).message):
        advised = re.findall(r"training\.(\w+)", message)
        assert "microBatchSize" in advised
        for training in (PolicyTraining, RewardModelTraining):
            assert set(advised) <= {field.alias for field in training.model_fields.values()}
        assert "globalBatchSize" not in message


def test_oom_counter_of_both_cgroup_versions(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    assert oom_kills(tmp_path, membership) is None
    v1 = tmp_path / "memory" / "pod"
    v1.mkdir(parents=True)
    (v1 / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (v1 / "memory.limit_in_bytes").write_text("1048576\n")
    membership.write_text("5:memory:/pod\n")
    assert oom_kills(tmp_path, membership) == 3
    assert memory_limit(tmp_path, membership) == 1048576
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n")
    (tmp_path / "memory.max").write_text("max\n")
    membership.write_text("0::/\n")
    assert oom_kills(tmp_path, membership) == 1
    assert memory_limit(tmp_path, membership) is None


def test_rank_files_tell_the_launcher(tmp_path: Path) -> None:
    files = RankFiles(tmp_path, 1)
    assert read_states(tmp_path) == {}
    files.started()
    assert not read_states(tmp_path)[1].joined
    assert last_beat(tmp_path) is None
    files.joined()
    assert read_states(tmp_path)[1].joined
    assert last_beat(tmp_path) is not None
    RankFiles(tmp_path, 0).started()
    assert last_beat(tmp_path) is None, "a rank that has not joined has no heartbeat to judge by"
    files.ended(result_of(1, C.DIVERGED))
    assert read_results(tmp_path)[1].failure_class is C.DIVERGED


def test_a_second_sigterm_gives_no_more_time(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod that is deleted again gets one, and is killed when the first one's grace period ends."""
    config = tiny_world.config(tmp_path / "out", grace_seconds=30)
    with subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 60"], start_new_session=True) as deaf:
        (tmp_path / "rank-0.json").write_text(RankState(rank=0, pid=deaf.pid, joined=True).to_json())
        (tmp_path / "rank-0.beat").touch()
        supervisor = Supervisor(config, tmp_path, deaf, meet_within=60)
        try:
            with monkeypatch.context() as clock:
                for second in (100.0, 120.0):
                    clock.setattr(time, "monotonic", lambda now=second: now)
                    supervisor.request_stop()
            assert supervisor._why_end(126.0) is None
            assert isinstance(supervisor._why_end(128.0), Preempted), "3 s are for writing the result"
        finally:
            deaf.kill()


def test_waiting_for_a_name_outlasts_a_slow_dns() -> None:
    answers = iter([OSError("not yet"), OSError("not yet"), None])

    def resolve(_name: str) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    wait_for_name("train-0.train", 5, resolve)
    with pytest.raises(RendezvousFailed, match="train-0"):
        wait_for_name("train-0.train", 0, lambda _name: (_ for _ in ()).throw(OSError("never")))


def fat_result() -> Result:
    verdict = Verdict(metric="accuracy", state=VerdictState.FAIL, n=5, estimate=0.5, message="é" * 400)
    return result_of(0, C.GATE_FAILED).model_copy(
        update={
            "message": "ü" * 5000,
            "verdicts": (verdict,) * 6,
            "lineage": {f"input{index}": "sha256:" + "0" * 64 for index in range(20)},
            "skipped_checkpoints": tuple(SkippedCheckpoint(path="p" * 99, step=n, reason="r" * 99) for n in range(20)),
        }
    )


def test_the_termination_message_fits_and_keeps_the_verdicts() -> None:
    text = fat_result().compact()
    assert len(text.encode()) <= TERMINATION_MESSAGE_LIMIT
    read = Result.model_validate_json(text)
    assert (read.failure_class, len(read.verdicts), read.verdicts[0].estimate) == (C.GATE_FAILED, 6, 0.5)
    small = result_of(0, C.SUCCESS).model_copy(update={"lineage": {"a": "b"}})
    assert Result.model_validate_json(small.compact()) == small, "what fits is left whole"


def test_the_reporter_repeats_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_TERMINATION_LOG", str(tmp_path / "log"))
    path = tmp_path / "result.json"
    assert report(["--result", str(path)]) == 1
    assert "before it could write" in capsys.readouterr().err
    path.write_text(fat_result().to_json())
    assert report(["--result", str(path)]) == 0
    assert Result.model_validate_json((tmp_path / "log").read_bytes()).failure_class is C.GATE_FAILED
