"""Lost writes, lost pods and lost nodes in the life of a training job."""

from __future__ import annotations

from tests.unit.jobs_world import (
    OUT,
    World,
    owned_by_nobody,
    result,
    reward_spec,
    rfc3339,
    started,
    success,
    training,
)


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


def test_storage_is_asked_from_where_the_pods_could_reach_it() -> None:
    reach = {
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"topology.kubernetes.io/zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "securityContext": {"runAsUser": 1000},
    }
    world = training(reward_spec(trainer={"numNodes": 2, "podTemplate": {"spec": {**reach, "hostname": "not-this"}}}))
    world.children["Pod"].clear()
    world.finish_job("Complete")
    world.tick()
    pod_spec = world.children["Job"]["rm-train-a1-report"]["spec"]["template"]["spec"]
    user = pod_spec["securityContext"]
    assert {**pod_spec, **reach} == {**pod_spec, "securityContext": reach["securityContext"]}
    assert (user["runAsUser"], user["runAsNonRoot"]) == (1000, True)
    assert "hostname" not in pod_spec


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
