"""Suspension, queues, deadlines, budgets and times to live of a training job."""

from __future__ import annotations

import pytest

from tests.unit.jobs_world import (
    START,
    priced,
    result,
    reward_spec,
    started,
    success,
    training,
)


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


def test_the_pod_template_may_change_in_the_edit_that_resumes_a_job() -> None:
    changed = {"numNodes": 2, "podTemplate": {"spec": {"priorityClassName": "batch"}}}
    world = training()
    world.fail(1)  # another attempt would follow
    world.edit(suspend=True)
    world.edit(suspend=False, trainer=changed)
    assert world.holds("Accepted")[0] == "True", world.condition("Accepted")["message"]
    world.tick(60)
    assert world.status["attempt"] == 2
    world.edit(trainer={"numNodes": 2})
    assert world.holds("Accepted") == ("False", "DigestMismatch")


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


def test_an_attempt_that_ended_while_the_operator_was_away_has_used_nothing_since() -> None:
    world = training(reward_spec(trainer=GPU, activeDeadlineSeconds=3600))
    for pod in world.pods():
        world.mark(pod, "DisruptionTarget", reason="EvictionByEvictionAPI")
    world.exit(1, 20, result("Preempted", 20), after=600)
    world.exit(0, 20, result("Preempted", 20))
    world.finish_job("Failed")
    world.tick(7200)
    assert world.holds("Failed")[0] == "False", world.condition("Failed")["message"]
    assert world.status["attempt"] == 2
    assert world.status["usage"]["gpuSeconds"] == pytest.approx(8 * 600)
    assert world.status["usage"]["lostSeconds"] == pytest.approx(600)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_training_that_is_done_is_not_stopped_before_its_job_says_so(hangs: bool) -> None:
    world = training(reward_spec(activeDeadlineSeconds=600))
    world.exit(0, 0, success(), "Completed", after=599)
    if not hangs:
        world.exit(1, 0, "", "Completed")
    world.tick(2)
    assert world.holds("Failed")[0] == ("True" if hangs else "False")
    if not hangs:
        world.finish_job("Complete")
        world.tick()
        assert world.phase == "Succeeded"


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


def test_pods_that_are_ending_are_billed_as_they_were_started() -> None:
    prices = priced(gpu=2.5)
    world = training(reward_spec(trainer=GPU, budget={"gpuHours": 8.0}), settings=prices)
    world.tick(1800)
    world.edit(suspend=True, trainer=GPU | {"numNodes": 16})  # two edits, seen at once
    assert world.status["usage"]["gpuSeconds"] == pytest.approx(8 * 1800)
    assert world.status["usage"]["costUSD"] == pytest.approx(8 * 2.5 / 2)
    world.edit(suspend=False)
    assert world.status["attempt"] == 2
    assert world.last["gpus"] == 64


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


def test_an_eviction_while_the_operator_was_away_is_billed_until_it_came() -> None:
    queue = {"kueue.x-k8s.io/queue-name": "team"}
    world = started(reward_spec(trainer=GPU, activeDeadlineSeconds=3600), labels=queue)
    world.job["spec"]["suspend"] = False
    world._start_pods(world.job)
    world.tick()
    world.run_pods()
    world.report()
    world.now = START.replace(minute=10)
    world.job["spec"]["suspend"] = True
    world.finish_job("Suspended")
    world.children["Pod"].clear()
    world.tick(7200)
    assert world.phase == "Queued"
    assert world.last["usage"]["gpuSeconds"] == pytest.approx(8 * 600)
