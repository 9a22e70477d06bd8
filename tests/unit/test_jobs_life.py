"""The life of a training job: from acceptance to its artifact, through failures, suspension and limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_operator.kinds.base import Key
from tests.unit.jobs_world import (
    OUT,
    START,
    World,
    digest,
    owned_by_nobody,
    policy_spec,
    priced,
    result,
    reward_spec,
    rfc3339,
    success,
)


def started(spec: dict[str, Any] | None = None, **options: Any) -> World:
    world = World(spec, **options)
    world.tick()
    return world


def training(spec: dict[str, Any] | None = None, **options: Any) -> World:
    world = started(spec, **options)
    world.run_pods()
    world.report()
    return world


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


def test_suspending_ends_the_attempt_and_resuming_begins_the_next() -> None:
    world = training()
    world.now = world.now.replace(minute=5)
    world.edit(suspend=True)
    assert world.phase == "Suspended"
    assert world.holds("Suspended") == ("True", "Suspended")
    assert world.pods() == []
    assert world.last["action"] == "Suspend"
    used = world.status["usage"]["trainingSeconds"]
    assert used == 300.0
    world.tick(3600)
    world.edit(suspend=False)
    assert world.status["attempt"] == 2
    assert world.status["usage"]["trainingSeconds"] == used
    assert world.status["restarts"] == 0
    world.run_pods()
    world.report(step=9)
    world.complete()
    assert world.phase == "Succeeded"


def test_the_reason_of_a_stop_is_in_the_status_before_the_job_is_deleted() -> None:
    world = training()
    world.log.clear()
    world.edit(suspend=True)
    assert world.log[:2] == ["status", "delete Job rm-train-a1"]


def test_suspended_is_only_true_when_nothing_runs() -> None:
    world = training()
    stuck = world.pods()[0]
    world.request_deletion(stuck)
    world.edit(suspend=True)
    world.children["Pod"][stuck["metadata"]["name"]] = stuck
    world.status.pop("conditions")
    world.primary["status"]["attempts"][-1].pop("endedAt", None)
    world.primary["status"]["attempts"][-1]["stopping"] = "Suspended"
    world.tick()
    assert world.phase == "Suspended"
    assert world.holds("Suspended")[0] == "False"
    world.wait()  # the pod is on a lost node: given up after a while
    assert world.holds("Suspended")[0] == "True"


def test_a_job_created_suspended_has_no_children() -> None:
    world = started(reward_spec(suspend=True))
    assert world.phase == "Suspended"
    assert not world.children["Job"]
    assert world.status["attempt"] == 0


def test_the_pre_running_deadline_fails_a_job_that_cannot_start() -> None:
    world = started(reward_spec(preRunningDeadlineSeconds=90))
    pod = world.pods()[0]
    world.mark(pod, "PodScheduled", status="False", reason="Unschedulable")
    world.tick()
    assert world.holds("PodsReady") == ("False", "Unschedulable")
    world.wait()
    assert world.now == START.replace(minute=1, second=30)
    assert world.holds("Failed") == ("True", "PreRunningDeadlineExceeded")
    assert world.pods() == []


def test_the_pre_running_deadline_leaves_a_job_alone_that_started() -> None:
    world = training(reward_spec(preRunningDeadlineSeconds=90))
    world.tick(10_000)
    assert world.phase == "Running"


def test_the_active_deadline_is_over_all_attempts_without_suspended_time() -> None:
    world = training(reward_spec(activeDeadlineSeconds=600))
    world.now = world.now.replace(minute=4)
    world.edit(suspend=True)
    world.tick(36_000)
    world.edit(suspend=False)
    world.run_pods()
    world.report()
    world.tick(359)
    assert world.phase == "Running"
    world.tick(2)
    assert world.holds("Failed") == ("True", "DeadlineExceeded")
    assert world.pods() == []


GPU = {"numNodes": 2, "numProcPerNode": 1, "resourcesPerNode": {"limits": {"nvidia.com/gpu": "4"}}}


def test_a_gpu_budget_is_cumulative_and_suspends() -> None:
    world = training(reward_spec(trainer=GPU, budget={"gpuHours": 8.0}))  # one hour of 8 GPUs
    world.tick(1800)
    world.edit(suspend=True)
    world.tick(7200)
    world.edit(suspend=False)
    world.run_pods()
    world.report()
    world.wait()
    assert world.phase == "Suspended"
    assert world.holds("WithinBudget") == ("False", "BudgetExhausted")
    assert world.holds("Suspended") == ("True", "BudgetExhausted")
    assert world.status["usage"]["gpuSeconds"] == pytest.approx(8 * 3600, abs=1)
    assert world.pods() == []
    world.edit(budget={"gpuHours": 9.0})
    assert world.status["attempt"] == 3
    assert world.holds("WithinBudget")[0] == "True"


def test_a_budget_can_fail_the_job() -> None:
    world = training(reward_spec(trainer=GPU, budget={"gpuHours": 8.0, "onExceeded": "Fail"}))
    world.wait()
    assert world.holds("Failed") == ("True", "BudgetExhausted")


def test_a_budget_of_money_needs_prices() -> None:
    world = started(reward_spec(trainer=GPU, budget={"costUSD": 10}))
    assert world.holds("Accepted") == ("False", "NoPrice")
    assert "nvidia.com/gpu" in world.condition("Accepted")["message"]
    assert world.phase == "Failed"
    assert not world.children["Job"]
    world.edit(budget=None)
    assert world.holds("Failed")[0] == "False"
    assert world.status["attempt"] == 1


def test_money_is_counted_and_limited() -> None:
    world = training(reward_spec(trainer=GPU, budget={"costUSD": 20}), settings=priced(gpu=2.5))
    world.wait()
    assert world.holds("Suspended") == ("True", "BudgetExhausted")
    assert (world.now - START).total_seconds() == pytest.approx(3600)
    assert world.status["usage"]["costUSD"] == pytest.approx(20.0)


def test_the_time_to_live_deletes_children_and_never_the_job() -> None:
    world = training(reward_spec(ttlSecondsAfterFinished=100))
    world.complete()
    assert world.children["Job"]
    world.wait()
    assert world.now >= START.replace(minute=1, second=40)
    assert not any(world.children[kind] for kind in ("Job", "Service", "ConfigMap"))
    world.tick(1000)
    assert world.phase == "Succeeded"
    assert world.status["attempt"] == 1
    assert not world.children["Job"]


def test_a_wrong_world_size_ends_the_job_in_one_report() -> None:
    world = started()
    world.run_pods()
    world.report(world_size=1)
    assert world.holds("Failed") == ("True", "RendezvousMismatch")
    assert "world size of 1" in world.condition("Failed")["message"]
    assert world.pods() == []


def test_a_report_of_another_attempt_is_not_believed() -> None:
    world = started()
    world.run_pods()
    world.report(world_size=7, attempt=9)
    assert world.phase == "Initializing"
    assert "progress" not in world.status


def test_a_queue_gets_a_suspended_job_and_its_eviction_is_no_failure() -> None:
    world = started(labels={"kueue.x-k8s.io/queue-name": "team", "other": "label"})
    assert world.job["spec"]["suspend"] is True
    assert world.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert "other" not in world.job["metadata"]["labels"]
    assert world.phase == "Queued"
    assert world.holds("Admitted") == ("False", "WaitingForQuota")

    def admit() -> None:
        world.job["spec"]["suspend"] = False
        world._start_pods(world.job)
        world.tick()
        world.run_pods()
        world.report()

    admit()
    assert world.phase == "Running"
    world.now = world.now.replace(minute=2)
    world.job["spec"]["suspend"] = True
    evicted = world.pods()
    for index in (0, 1):
        world.request_deletion(evicted[index])
        world.exit(index, 20, result("Preempted", 20))
    world.tick()
    assert world.phase == "Queued"
    world.now = world.now.replace(minute=3)
    for pod in evicted:
        world.terminate(pod["metadata"]["name"])
    admit()
    assert world.phase == "Running"
    assert world.status["attempt"] == 1
    assert len(world.last["podUids"]) == 4
    assert world.last["usage"]["trainingSeconds"] == 120.0
    world.complete()
    assert world.phase == "Succeeded"


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


# Upstream.


def test_a_policy_waits_for_a_validated_reward_model() -> None:
    world = World(policy_spec(), kind="PolicyOptimizationJob")
    world.related = {Key("RewardModelJob", "ml", "rm"): None}
    world.tick()
    assert world.phase == "Pending"
    assert world.holds("Progressing") == ("False", "WaitingForUpstream")
    assert "does not exist" in world.condition("Progressing")["message"]
    world.upstream(validated=False, phase="Running")
    world.tick()
    assert "it is Running" in world.condition("Progressing")["message"]
    assert not world.children["Job"]
    world.upstream()
    world.tick()
    assert world.status["attempt"] == 1
    assert world.status["lineage"]["rewardModel"] == digest("e")


def test_a_changed_upstream_digest_is_an_error_and_no_attempt_starts() -> None:
    world = World(policy_spec(), kind="PolicyOptimizationJob")
    world.upstream()
    world.tick()
    world.run_pods()
    world.upstream(letter="f")
    world.tick()
    assert world.holds("Accepted") == ("False", "DigestMismatch")
    world.fail(1)
    world.tick(400)
    assert world.status["attempt"] == 1
    assert world.holds("Failed") == ("True", "DigestMismatch")
    world.upstream()
    world.tick()
    assert world.status["attempt"] == 2


def test_an_upstream_that_is_gone_does_not_stop_a_run_that_began() -> None:
    world = World(policy_spec(), kind="PolicyOptimizationJob")
    world.upstream()
    world.tick()
    world.run_pods()
    world.related.clear()
    world.fail(1)
    world.tick(400)
    assert world.status["attempt"] == 2


@pytest.mark.parametrize("same", ["digest", "preferences"])
def test_an_audit_that_shares_weights_or_preferences_is_refused(same: str) -> None:
    world = World(policy_spec(auditRewardModel={"jobRef": {"name": "audit"}}), kind="PolicyOptimizationJob")
    world.upstream("rm", "e", lineage={"preferences": digest("1")})
    other = "e" if same == "digest" else "f"
    world.upstream("audit", other, lineage={"preferences": digest("1" if same == "preferences" else "2")})
    world.tick()
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert not world.children["Job"]
    world.upstream("audit", "f", lineage={"preferences": digest("2")})
    world.tick()
    assert world.status["attempt"] == 1


# What the API server cannot check.


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"training": {"globalBatchSize": 63}}, "is not divisible by the world size of 2"),
        ({"trainer": {"podTemplate": {"spec": {"containers": [{"env": [{"name": "PET_NNODES"}]}]}}}}, "PET_NNODES"),
        ({"output": {"uri": "pvc://artifacts/../etc"}}, "spec.output.uri"),
        ({"validation": {"humanScores": {"uri": "s3://x", "digest": digest("a")}}}, "spec.validation.humanScores.uri"),
    ],
)
def test_a_spec_that_cannot_be_run_is_refused(changes: dict[str, Any], part: str) -> None:
    world = started(reward_spec(**changes))
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert part in world.condition("Accepted")["message"]
    assert world.phase == "Failed"
    assert not world.children["Job"]


def test_a_pod_template_that_drifts_is_refused_until_it_is_put_back() -> None:
    world = training()
    world.edit(trainer={"numNodes": 2, "podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}})
    assert world.holds("Accepted") == ("False", "DigestMismatch")
    assert world.phase == "Running"
    world.fail(1)
    world.tick(400)
    assert world.status["attempt"] == 1
    world.edit(suspend=True)
    assert world.holds("Accepted")[0] == "True"
    world.edit(suspend=False)
    assert world.status["attempt"] == 2
    assert world.job["spec"]["template"]["spec"]["nodeSelector"] == {"a": "b"}


# Lost writes, lost pods, lost nodes.


def test_a_lost_status_frees_no_name() -> None:
    world = training()
    world.fail(1)
    world.tick(10)
    assert world.status["attempt"] == 2
    world.primary["status"] = {}
    world.tick()
    assert world.status["attempt"] == 2
    assert world.last["jobUid"] == world.job["metadata"]["uid"]
    world.primary["status"] = {}
    world.children["Job"].clear()
    world.children["Pod"].clear()
    owned_by_nobody(world, 5)
    world.tick()
    assert world.status["attempt"] == 6


def test_an_attempt_whose_job_was_never_created_is_created_under_its_own_name() -> None:
    world = started()
    world.children["Job"].clear()
    world.children["Pod"].clear()
    world.primary["status"]["attempts"][0].pop("jobUid")
    world.tick()
    assert world.job["metadata"]["name"] == "rm-train-a1"
    assert world.status["attempt"] == 1


def test_a_job_deleted_by_somebody_is_followed_by_another_attempt() -> None:
    world = training()
    world.children["Job"].clear()
    pods = world.pods()
    for index in (0, 1):
        world.request_deletion(pods[index])
    world.tick()
    assert world.status["attempt"] == 1
    for index in (0, 1):
        world.exit(index, 20, result("Preempted", 20))
    world.tick()
    assert world.attempts[0]["failureClass"] == "Preempted"
    assert world.status["attempt"] == 2


def lost_messages(end: str = "Complete") -> World:
    world = training()
    world.reports = {}
    world.children["Pod"].clear()
    world.finish_job(end)
    world.tick()
    return world


def answer(world: World, message: str, code: int = 0) -> None:
    message = message.replace('"now"', f'"{rfc3339(world.now)}"')
    [pod] = world.pods(component="reporter")
    state = {"exitCode": code, "reason": "Completed", "message": message, "finishedAt": rfc3339(world.now)}
    pod["status"] = {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [{"name": "reporter", "state": {"terminated": state}}],
    }
    [job] = [j for name, j in world.children["Job"].items() if name.endswith("-report")]
    job["status"] = {"conditions": [{"type": "Failed" if code else "Complete", "status": "True"}]}
    world.tick()


def test_lost_messages_are_read_again_from_storage() -> None:
    world = lost_messages()
    reporter = world.children["Job"]["rm-train-a1-report"]
    [container] = reporter["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "rlhf_trainer.report", "--result", f"{OUT}/a1/result.json"]
    assert container["volumeMounts"][1]["readOnly"] is True
    assert world.holds("Progressing") == ("False", "OutcomeUnknown")
    answer(world, success())
    assert world.phase == "Succeeded"


def test_a_stored_failure_counts_as_what_it_was() -> None:
    world = lost_messages("Failed")
    answer(world, result("Diverged", 12))
    assert world.holds("Failed") == ("True", "Diverged")


def test_when_storage_has_no_result_the_outcome_is_unknown_and_restarts() -> None:
    world = lost_messages()
    answer(world, "no result.json", code=1)
    assert (world.attempts[0]["failureClass"], world.attempts[0]["reason"]) == ("Unknown", "OutcomeUnknown")
    world.wait()
    assert world.status["attempt"] == 2
    assert "rm-train-a1-report" not in world.children["Job"]


def test_exit_zero_without_a_result_is_no_success() -> None:
    world = training()
    world.complete("done!")
    assert world.phase != "Succeeded"
    assert "rm-train-a1-report" in world.children["Job"]


def test_a_pod_on_a_lost_node_is_abandoned() -> None:
    world = training()
    lost = world.pods()[1]
    world.request_deletion(lost, grace=0)
    world.mark(lost, "DisruptionTarget", reason="DeletionByTaintManager")
    world.exit(0, 21, result("Rendezvous", 21))
    world.finish_job("FailureTarget")
    world.tick()
    assert "endedAt" not in world.last
    world.wait()
    assert world.attempts[0]["failureClass"] == "Infrastructure"
    assert world.status["attempt"] == 2


def test_two_attempts_never_run_at_once() -> None:
    world = training()
    world.fail(1)
    left = owned_by_nobody(world, 1)
    left["status"]["phase"] = "Running"
    world.tick(400)
    assert world.status["attempt"] == 1
    assert world.holds("Progressing") == ("False", "Restarting")
    del world.children["Pod"]["left-1"]
    world.tick()
    assert world.status["attempt"] == 2


def test_children_of_a_namesake_are_left_alone() -> None:
    world = started()
    foreign = dict(world.children["Job"].pop("rm-train-a1"))
    world = World()
    foreign["metadata"] = foreign["metadata"] | {
        "name": "rm-train-a9",
        "ownerReferences": [{"uid": "another", "controller": True}],
    }
    world.children["Job"]["rm-train-a9"] = foreign
    world.tick()
    assert "delete Job rm-train-a9" not in world.log
    assert world.status["attempt"] == 1


def test_images_that_cannot_be_pulled_are_named() -> None:
    world = started()
    waiting = {"name": "trainer", "image": "nowhere/x:1", "state": {"waiting": {"reason": "ImagePullBackOff"}}}
    world.pods()[0]["status"]["containerStatuses"] = [waiting]
    world.tick()
    assert world.holds("PodsReady") == ("False", "ImagePullFailed")
    assert "nowhere/x:1" in world.condition("PodsReady")["message"]
    assert world.phase == "Initializing"


def test_a_pod_that_is_no_longer_ready_degrades_the_job() -> None:
    world = training()
    world.mark(world.pods()[1], "Ready", status="False")
    world.tick()
    assert world.phase == "Degraded"


# Progress and checkpoints.


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


def test_the_checkpoint_ledger_is_bounded() -> None:
    world = training()
    world.report(step=500, checkpoints=[checkpoint(step) for step in range(10, 500, 10)])
    steps = [entry["step"] for entry in world.status["checkpoints"]]
    assert steps == list(range(400, 500, 10))
    before = len(world.log)
    world.tick()
    assert len(world.log) == before


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
