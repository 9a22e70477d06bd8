"""Progress, checkpoints and ledgers in the status of a training job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.jobs_world import (
    OUT,
    START,
    digest,
    result,
    reward_spec,
    rfc3339,
    started,
    success,
    training,
)


def checkpoint(step: int, attempt: int = 1) -> dict[str, Any]:
    path = f"{OUT}/a{attempt}/checkpoints/step-{step:08d}"
    return {"step": step, "attempt": attempt, "path": path, "digest": digest("9"), "time": rfc3339(START)}


def test_progress_is_written_every_30_s_and_at_each_checkpoint() -> None:
    world = training()
    writes = world.log.count("status")
    for second in range(1, 30):
        world.now += START.replace(second=1) - START
        world.report(step=second)
    assert world.log.count("status") == writes
    world.now += START.replace(second=1) - START
    world.report(step=30)
    assert world.log.count("status") == writes + 1
    world.report(step=31, checkpoints=[checkpoint(31)])
    assert world.log.count("status") == writes + 2
    assert world.holds("Checkpointed")[0] == "True"


def test_a_run_that_ends_after_its_first_report_has_all_its_steps() -> None:
    world = started()
    world.run_pods()
    world.report(step=0, totalSteps=0, phase="Initializing")
    world.complete(success(step=16, totalSteps=16))
    assert (world.status["progress"]["step"], world.status["progress"]["totalSteps"]) == (16, 16)


def test_a_skipped_checkpoint_is_an_event_that_says_which_and_why() -> None:
    world = training()
    world.fail(21, result("Rendezvous", 21))
    world.tick(10)
    world.run_pods()
    skipped = {"path": f"{OUT}/a1/checkpoints/step-00000040", "step": 40, "reason": "model.pt: wrong sha256"}
    world.report(step=31, resumedFrom=checkpoint(30), skippedCheckpoints=[skipped])
    [told] = world.told("CheckpointSkipped")
    assert "step 40" in told
    assert "model.pt: wrong sha256" in told
    assert "step-00000040" in told
    assert world.told("Resumed") == ["attempt 2 resumed from the checkpoint of step 30"]
    assert world.last["resumedFromStep"] == 30


def test_a_converted_checkpoint_is_named_as_such() -> None:
    world = training()
    world.fail(21, result("Rendezvous", 21))
    world.tick(10)
    world.run_pods()
    world.report(step=31, resumedFrom={**checkpoint(30), "convertedFrom": 4})
    told = "attempt 2 resumed from the checkpoint of step 30, which was converted: 4 ranks wrote it"
    assert world.told("Resumed") == [told]
    assert world.last["convertedFrom"] == 4


def test_numbers_that_json_does_not_know_are_left_out() -> None:
    world = training()
    world.now += START.replace(second=30) - START
    nan = float("nan")
    verdict = {"metric": "accuracy", "state": "Unknown", "n": 0, "estimate": nan, "lower": nan}
    guardrail = {"metric": "kl", "state": "Breached", "value": nan, "sinceStep": 3, "action": "Alert"}
    world.report(step=3, metrics={"loss": nan, "kl": 0.5}, verdicts=[verdict], guardrails=[guardrail])
    assert world.status["metrics"] == {"kl": 0.5}
    assert "estimate" not in world.status["verdicts"][0]
    json.dumps(world.status, allow_nan=False)
    assert world.holds("GuardrailsHealthy") == ("False", "GuardrailBreached")


def test_times_without_a_zone_are_taken_as_utc() -> None:
    world = training()
    world.now = START.replace(minute=5)
    saved = checkpoint(5) | {"time": "2026-01-01T00:03:00"}
    world.report(5, checkpoints=[saved], lastStepAt="2026-01-01T00:04:00", expectedEndAt="2026-01-01T01:10:00+01:00")
    assert world.status["progress"]["lastStepAt"] == "2026-01-01T00:04:00Z"
    assert world.status["progress"]["expectedEndAt"] == "2026-01-01T00:10:00Z"
    assert world.status["checkpoints"][0]["time"] == "2026-01-01T00:03:00Z"


def test_the_checkpoint_ledger_is_bounded() -> None:
    world = training()
    world.report(step=500, checkpoints=[checkpoint(step) for step in range(10, 500, 10)])
    steps = [entry["step"] for entry in world.status["checkpoints"]]
    assert steps == list(range(400, 500, 10))
    before = len(world.log)
    world.tick()
    assert len(world.log) == before


@pytest.mark.parametrize(("resumed", "known"), [(None, []), (70, [50, 60, 70])])
def test_checkpoints_that_an_attempt_passed_over_are_known_no_more(resumed: int | None, known: list[int]) -> None:
    world = training()
    world.report(step=100, checkpoints=[checkpoint(step) for step in range(50, 110, 10)])
    world.fail(1)
    world.reports = {}
    world.tick(60)
    world.run_pods()
    world.report(step=10, resumedFrom=checkpoint(resumed) if resumed else None)
    assert [entry["step"] for entry in world.status["checkpoints"]] == known
    assert world.holds("Checkpointed")[0] == ("True" if known else "False")
    saved = checkpoint(80, attempt=2)
    world.tick(1)
    world.report(step=80, checkpoints=[saved], resumedFrom=checkpoint(resumed) if resumed else None)
    assert world.status["checkpoints"][-1] == saved, "a new checkpoint is written down at once"


def test_the_attempt_ledger_is_bounded_and_its_totals_are_kept() -> None:
    world = started(reward_spec(failurePolicy={"maxRestarts": 20}))
    for _ in range(15):
        world.run_pods()
        world.report(step=1)
        world.now += START.replace(minute=1) - START
        world.fail(1)
        world.reports = {}
        world.tick(400)
    assert [attempt["number"] for attempt in world.attempts] == list(range(7, 17))
    assert world.status["evictedAttempts"]["count"] == 6
    assert (world.status["restarts"], world.status["restartsCounted"]) == (15, 15)
    ended = 15 * 62.0
    assert world.status["usage"]["initializingSeconds"] + world.status["usage"]["trainingSeconds"] == pytest.approx(
        ended, abs=1.0
    )


def test_lost_training_is_counted_from_the_last_checkpoint() -> None:
    world = training()
    world.report(step=5, checkpoints=[checkpoint(5) | {"time": rfc3339(START.replace(minute=3))}])
    world.now = START.replace(minute=5)
    world.fail(1)
    assert world.attempts[0]["usage"]["lostSeconds"] == pytest.approx(122.0, abs=1.0)


def test_auto_processes_are_the_gpus_of_one_node() -> None:
    trainer = {"numNodes": 2, "resourcesPerNode": {"limits": {"nvidia.com/gpu": 4}}}
    world = started(reward_spec(trainer=trainer))
    env = {e["name"]: e.get("value") for e in world.job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"]) == ("2", "4")
    world.run_pods()
    world.report(world_size=8)
    assert world.phase == "Running"


def test_an_unreadable_spec_changes_nothing_but_what_is_said() -> None:
    world = training()
    world.edit(trainer={"numNodes": "many"})
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert "trainer" in world.condition("Accepted")["message"]
    assert world.children["Job"]
    world.edit(trainer={"numNodes": 2})
    assert world.phase == "Running"
