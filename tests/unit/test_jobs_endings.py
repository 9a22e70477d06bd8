"""How attempts end, which failure counts as the cause, and what is started again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.jobs_world import (
    result,
    reward_spec,
    rfc3339,
    started,
    training,
)

ROWS = [
    # exit code, termination message, container reason -> class, action, counted, reason of Failed
    (10, result("GateFailed", 10), "Error", "GateFailed", "Fail", False, "RewardGateFailed"),
    (11, result("Invalid", 11), "Error", "Invalid", "Fail", False, "InvalidData"),
    (12, result("Diverged", 12), "Error", "Diverged", "Fail", False, "Diverged"),
    (13, result("GuardrailStopped", 13), "Error", "GuardrailStopped", "Fail", False, "GuardrailBreached"),
    (14, result("GuardrailPaused", 14), "Error", "GuardrailPaused", "Suspend", False, ""),
    (21, result("Rendezvous", 21), "Error", "Rendezvous", "Restart", True, ""),
    (22, result("NoProgress", 22), "Error", "NoProgress", "Restart", True, ""),
    (137, "", "OOMKilled", "OutOfMemory", "Fail", False, "OutOfMemory"),
    (1, result("OutOfMemory", 1), "Error", "OutOfMemory", "Fail", False, "OutOfMemory"),
    (1, "Traceback (most recent call last): boom", "Error", "Unknown", "Restart", True, ""),
    (12, "not JSON at all", "Error", "Diverged", "Fail", False, "Diverged"),
    (12, result("Invalid", 11), "Error", "Diverged", "Fail", False, "Diverged"),  # a message that is not this exit's
    (139, "", "Error", "Unknown", "Restart", True, ""),
    (20, result("Preempted", 20), "Error", "Unknown", "Restart", True, ""),  # nobody in the cluster asked for it
]


@pytest.mark.parametrize(("code", "message", "container", "failure_class", "action", "counted", "failed"), ROWS)
def test_the_exit_table(
    code: int, message: str, container: str, failure_class: str, action: str, counted: bool, failed: str
) -> None:
    world = training()
    if code == 20:  # no survivor whose deletion is seen: both simply end
        world.exit(1, 20, message)
        world.exit(0, 20, message)
        world.finish_job("Failed")
        world.tick()
    else:
        world.fail(code, message, container)
    attempt = world.attempts[0]
    assert (attempt["failureClass"], attempt["action"], attempt["counted"]) == (failure_class, action, counted)
    restarted = "Restarting" if failure_class == "Unknown" else "Initializing"  # the unknown waits, others do not
    assert world.phase == {"Fail": "Failed", "Suspend": "Suspended", "Restart": restarted}[action]
    if failed:
        assert world.holds("Failed") == ("True", failed)
        assert world.told("AttemptFailed")
    assert world.status["restartsCounted"] == int(counted)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("PreemptionByScheduler", "PreemptedByScheduler"),
        ("DeletionByTaintManager", "NodeLost"),
        ("TerminationByKubelet", "NodeLost"),
        ("EvictionByEvictionAPI", "NodeLost"),
    ],
)
def test_a_disruption_restarts_at_once_and_does_not_count(cause: str, reason: str) -> None:
    world = training()
    world.request_deletion(world.pods()[1])
    world.mark(world.pods()[1], "DisruptionTarget", reason=cause)
    world.exit(1, 20, result("Preempted", 20), after=3)
    world.exit(0, 21, result("Rendezvous", 21))
    world.finish_job("Failed")
    world.tick()
    first = world.attempts[0]
    assert (first["failureClass"], first["reason"], first["counted"]) == ("Infrastructure", reason, False)
    assert world.status["attempt"] == 2
    assert (world.status["restarts"], world.status["restartsCounted"]) == (1, 0)


def test_a_pod_that_fills_the_disk_of_its_node_is_counted() -> None:
    """Its successor would fill the next one."""
    world = training()
    said = "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 8Gi."
    world.request_deletion(world.pods()[1])
    world.mark(world.pods()[1], "DisruptionTarget", reason="TerminationByKubelet", message=said)
    world.exit(1, 137, after=3)
    world.exit(0, 21, result("Rendezvous", 21))
    world.finish_job("Failed")
    world.tick()
    first = world.attempts[0]
    assert (first["failureClass"], first["reason"], first["counted"]) == ("Unknown", "NoSpace", True)
    assert "request ephemeral-storage in spec.trainer" in first["message"]


def test_a_disruption_after_a_failure_does_not_hide_it() -> None:
    world = training()
    world.exit(1, 12, result("Diverged", 12))
    world.mark(world.pods()[1], "DisruptionTarget", reason="DeletionByTaintManager")
    world.exit(0, 20, result("Preempted", 20))
    world.finish_job("Failed")
    world.tick()
    assert world.last["failureClass"] == "Diverged"


def test_an_evicted_pod_without_a_container_is_infrastructure() -> None:
    world = started()
    pod = world.pods()[0]
    pod["status"] |= {"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}
    world.finish_job("Failed")
    world.tick()
    assert world.attempts[0]["failureClass"] == "Infrastructure"
    assert "low on memory" in world.attempts[0]["message"]


def test_a_deleted_pod_is_a_preemption_although_its_peer_failed_on_it() -> None:
    world = training()
    world.request_deletion(world.pods()[1])
    world.exit(0, 21, result("Rendezvous", 21), after=3)
    world.exit(1, 20, result("Preempted", 20), after=2)
    world.finish_job("Failed")
    world.tick()
    assert world.attempts[0]["failureClass"] == "Preempted"
    assert not world.attempts[0]["counted"]
    assert world.status["attempt"] == 2


def test_a_peer_that_stops_together_with_a_deleted_pod_does_not_hide_the_deletion() -> None:
    world = training()
    world.request_deletion(world.pods()[1])
    world.exit(0, 20, result("Preempted", 20))  # the ranks agree on the step after which they stop
    world.tick()
    world.exit(1, 20, result("Preempted", 20))
    world.finish_job("Failed")
    world.tick()
    assert world.attempts[0]["failureClass"] == "Preempted"
    assert not world.attempts[0]["counted"]


def test_a_sidecar_that_crashes_ends_nothing() -> None:
    world = training()
    pod = world.pods()[0]
    crashed = {"name": "logs", "restartCount": 1, "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}
    pod["status"]["initContainerStatuses"] = [crashed]
    pod["status"]["containerStatuses"] = [{"name": "trainer", "state": {"running": {"startedAt": rfc3339(world.now)}}}]
    world.tick()
    assert world.phase == "Running"
    world.edit(suspend=True)  # which an attempt that failed would not heed
    assert world.phase == "Suspended"


def test_an_init_container_that_fails_its_pod_fails_the_attempt() -> None:
    world = started()
    for pod in world.pods():
        ended = {"exitCode": 3, "reason": "Error", "finishedAt": rfc3339(world.now)}
        pod["status"] |= {
            "phase": "Failed",
            "initContainerStatuses": [{"name": "fetch", "state": {"terminated": ended}}],
        }
    world.finish_job("Failed")
    world.tick()
    assert world.attempts[0]["exitCode"] == 3
    assert "container fetch exited 3" in world.attempts[0]["message"]


def test_the_earliest_failure_wins() -> None:
    world = training()
    world.exit(1, 12, result("Diverged", 12))
    world.exit(0, 21, result("Rendezvous", 21), after=3600)
    world.finish_job("Failed")
    world.tick()
    assert world.last["failureClass"] == "Diverged"


def test_in_the_same_second_the_cause_wins() -> None:
    world = training()
    world.exit(0, 21, result("Rendezvous", 21))
    world.exit(1, 137, "", "OOMKilled")
    world.finish_job("Failed")
    world.tick()
    assert world.last["failureClass"] == "OutOfMemory"


def test_a_failure_seen_once_outlives_its_pod() -> None:
    world = training()
    pod = world.exit(1, 11, result("Invalid", 11, message="row 7 has no prompt"))
    world.tick()
    assert world.last["failureClass"] == "Invalid"
    assert "endedAt" not in world.last
    world.terminate(pod["metadata"]["name"])
    world.children["Pod"].clear()
    world.finish_job("Failed")
    world.tick()
    assert world.holds("Failed") == ("True", "InvalidData")
    assert "row 7 has no prompt" in world.condition("Failed")["message"]


def test_counted_restarts_are_limited_and_uncounted_ones_are_not() -> None:
    world = started(reward_spec(failurePolicy={"maxRestarts": 1}))
    for _ in range(3):
        world.run_pods()
        world.mark(world.pods()[1], "DisruptionTarget", reason="PreemptionByScheduler")
        world.fail(20, result("Preempted", 20))
        world.tick(400)
    world.run_pods()
    world.fail(1)
    world.tick(400)
    assert world.status["restartsCounted"] == 1
    world.run_pods()
    world.fail(1)
    assert world.holds("Failed") == ("True", "MaxRestartsReached")
    assert world.status["restarts"] == 4


def test_an_unknown_failure_backs_off_longer_each_time_it_does_nothing() -> None:
    world = started(reward_spec(failurePolicy={"maxRestarts": 9}))
    waits = []
    for _ in range(4):
        world.run_pods()
        world.fail(1)
        plan = world.tick()
        assert world.phase == "Restarting"
        assert plan.requeue_after is not None
        waits.append(plan.requeue_after)
        world.wait()
    assert waits == pytest.approx([10, 20, 40, 80], abs=0.01)


RULES = [
    ({"name": "r", "onExitCodes": [7], "action": "FailJob"}, "Fail", False),
    ({"name": "r", "onExitCodes": [7], "action": "Ignore"}, "Restart", False),
    ({"name": "r", "onReasons": ["Unknown"], "action": "FailJob"}, "Fail", False),
    ({"name": "r", "onMessages": ["CUDA error"], "action": "FailJob"}, "Fail", False),
    ({"name": "r", "onMessages": ["NCCL"], "action": "FailJob"}, "Restart", True),
    ({"name": "r", "onExitCodes": [8], "onMessages": ["CUDA error"], "action": "FailJob"}, "Restart", True),
]


@pytest.mark.parametrize(("rule", "action", "counted"), RULES)
def test_user_rules_come_first(rule: dict[str, Any], action: str, counted: bool) -> None:
    world = training(reward_spec(failurePolicy={"rules": [rule]}))
    world.fail(7, "RuntimeError: CUDA error: device-side assert")
    assert (world.attempts[0]["action"], world.attempts[0]["counted"]) == (action, counted)
    if action == "Fail":
        assert world.holds("Failed")[1] == "NonRetriableExitCode"


def test_the_first_matching_rule_decides() -> None:
    rules = [
        {"name": "first", "onExitCodes": [7], "action": "Ignore"},
        {"name": "second", "onExitCodes": [7], "action": "FailJob"},
    ]
    world = training(reward_spec(failurePolicy={"rules": rules}))
    world.fail(7)
    assert world.attempts[0]["action"] == "Restart"
