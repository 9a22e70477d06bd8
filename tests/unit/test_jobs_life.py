"""The life of a training job, from acceptance to its artifact; waiting for people and gates."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.jobs_world import (
    OUT,
    World,
    digest,
    result,
    rfc3339,
    started,
    success,
    training,
)


def test_the_ledger_is_written_before_the_children_and_they_before_the_job() -> None:
    world = started()
    assert world.log == [
        "status",
        "create ConfigMap rm-train-a1",
        "create Service rm-train-a1",
        "create Job rm-train-a1",
        "status",
    ]
    assert world.status["attempt"] == 1
    assert world.phase == "Initializing"


def test_a_run_reaches_its_artifact() -> None:
    world = started()
    world.run_pods()
    assert world.phase == "Initializing"
    world.report(step=3)
    assert world.phase == "Running"
    assert world.status["progress"]["step"] == 3
    world.now = world.now.replace(minute=10)
    world.complete(success(step=100))
    assert world.phase == "Succeeded"
    assert world.status["progress"]["step"] == 100
    assert world.status["artifact"] == {
        "uri": f"pvc://artifacts/rm/{world.primary['metadata']['uid']}/a1/artifact",
        "digest": digest("d"),
    }
    assert world.holds("Complete") == ("True", "AsExpected")
    assert world.holds("Validated") == ("True", "AsExpected")
    assert world.status["usage"]["trainingSeconds"] == 600.0
    assert world.told("Complete")


@pytest.mark.parametrize("verdicts", [[], [{"metric": "accuracy", "state": "NeedMoreData", "n": 3}]])
def test_success_without_a_passed_verdict_is_no_evidence(verdicts: list[dict[str, Any]]) -> None:
    world = started()
    world.run_pods()
    world.complete(success(verdicts=verdicts))
    assert world.phase == "Succeeded"
    assert world.holds("Validated") == ("Unknown", "OutcomeUnknown")


@pytest.mark.parametrize("restart", [False, True])
def test_a_verdict_from_before_the_training_is_no_evidence_for_what_came_of_it(restart: bool) -> None:
    """A policy is first judged by best of n, which says nothing about the policy that is trained then."""
    world = started()
    world.run_pods()
    world.report(step=0, verdicts=[{"metric": "bestOfN", "state": "Pass", "n": 200}])
    assert world.status["verdicts"]
    if restart:
        world.fail(1)
        world.reports = {}
        world.tick(60)
        world.run_pods()
    world.complete(success(world.status["attempt"], verdicts=[]))
    assert world.phase == "Succeeded"
    assert world.holds("Validated") == ("Unknown", "OutcomeUnknown")


def test_verdicts_that_a_termination_message_had_no_room_for_are_those_of_the_last_report() -> None:
    world = training()
    world.now = world.now.replace(minute=5)
    world.report(step=100, phase="Saving", verdicts=[{"metric": "winRate", "state": "Pass", "n": 200}])
    world.complete(success(verdicts=[]))
    assert world.holds("Validated") == ("True", "AsExpected")


def test_nothing_is_written_at_rest() -> None:
    world = training()
    for _ in range(5):
        before = len(world.log)
        world.tick(60)
        assert len(world.log) == before
    world.complete()
    before = len(world.log)
    world.tick(3600)
    assert len(world.log) == before


def test_writes_of_a_whole_life_are_few() -> None:
    world = training()
    world.complete()
    writes = len(world.log)
    assert writes <= 3 + 6, world.log


def test_a_paused_guardrail_waits_for_an_acknowledgement_of_this_pause() -> None:
    world = World()
    world.decide("Acknowledge", attempt=1)  # too early to be about the pause
    world.run_pods()
    world.report()
    world.now = world.now.replace(minute=5)
    world.fail(14, result("GuardrailPaused", 14, message="kl above 12 for 5 steps"))
    assert world.phase == "Suspended"
    assert world.holds("GuardrailsHealthy") == ("False", "GuardrailBreached")
    assert "Acknowledge for attempt 1" in world.condition("Suspended")["message"]
    world.decide("Acknowledge", attempt=7)
    assert world.phase == "Suspended"
    world.decide("Acknowledge", attempt=1, expiresAt=rfc3339(world.now))
    assert world.phase == "Suspended"
    world.decide("Acknowledge", attempt=1)
    assert world.attempts[0]["releasedBy"] == "decision-3"
    assert world.status["attempt"] == 2


def gate_failed(state: str = "Fail") -> World:
    world = training()
    verdict = {"metric": "accuracy", "state": state, "n": 90, "lower": 0.5, "upper": 0.6, "threshold": 0.65}
    artifact = {"path": f"{OUT}/a1/artifact", "digest": digest("d")}
    message = result("GateFailed", 10, verdicts=[verdict], artifact=artifact)
    world.exit(0, 10, message)
    world.exit(1, 10, result("GateFailed", 10))
    world.finish_job("Failed")
    world.tick()
    return world


def test_a_failed_gate_names_the_verdict() -> None:
    world = gate_failed()
    assert world.holds("Validated") == ("False", "RewardGateFailed")
    assert "accuracy is Fail (n=90, interval 0.5 to 0.6, threshold 0.65)" in world.condition("Validated")["message"]
    assert world.status["artifact"]["digest"] == digest("d")


@pytest.mark.parametrize("state", ["Fail", "NeedMoreData"])
def test_a_gate_is_waived_for_one_digest_only(state: str) -> None:
    world = gate_failed(state)
    world.decide("Waive", digest=digest("f"))
    assert world.phase == "Failed"
    world.decide("Waive", digest=digest("d"))
    assert world.phase == "Succeeded"
    assert world.holds("Validated") == ("True", "Waived")
    assert world.status["waiver"] == {"decision": "decision-1", "by": "ada", "digest": digest("d")}
    world.decisions.clear()
    world.tick(60)
    assert world.phase == "Succeeded"


def test_an_attempt_that_ends_before_its_first_report_tells_by_its_result() -> None:
    world = started()
    world.run_pods()
    guardrail = {"metric": "kl", "state": "Healthy", "value": 0.1, "sinceStep": 1, "action": "Alert"}
    world.complete(success(step=4, totalSteps=4, worldSize=2, guardrails=[guardrail]))
    assert world.phase == "Succeeded"
    assert world.status["progress"] | {"reportedAt": ""} == {
        "attempt": 1, "phase": "Done", "step": 4, "totalSteps": 4, "worldSize": 2, "reportedAt": "",
    }  # fmt: skip
    assert [one["metric"] for one in world.status["guardrails"]] == ["kl"]
    assert world.holds("GuardrailsHealthy")[0] == "True"
