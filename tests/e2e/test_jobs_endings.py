"""Every row of the exit table, limits and human verbs, with real pods that play an ending."""

from __future__ import annotations

from tests.e2e.jobs_world import Namespace, condition, playing
from tests.e2e.rollout_world import eventually

FINAL = [
    # name, script, more of the container, policy -> class of the first attempt, reason of Failed, restarts, counted
    ("gate", "end(10, 'GateFailed')", {}, {}, "GateFailed", "RewardGateFailed", 0, 0),
    ("invalid", "end(11, 'Invalid')", {}, {}, "Invalid", "InvalidData", 0, 0),
    ("diverged", "end(12, 'Diverged')", {}, {}, "Diverged", "Diverged", 0, 0),
    ("stopped", "end(13, 'GuardrailStopped')", {}, {}, "GuardrailStopped", "GuardrailBreached", 0, 0),
    ("rendezvous", "end(21, 'Rendezvous')", {}, {"maxRestarts": 1}, "Rendezvous", "MaxRestartsReached", 1, 1),
    ("stuck", "end(22, 'NoProgress')", {}, {"maxRestarts": 1}, "NoProgress", "MaxRestartsReached", 1, 1),
    ("unknown", "raise SystemExit(3)", {}, {"maxRestarts": 1}, "Unknown", "MaxRestartsReached", 1, 1),
    (
        "memory",
        "hoard = [bytearray(1 << 20) for _ in range(1024)]",
        {"resources": {"limits": {"memory": "64Mi"}}},
        {},
        "OutOfMemory",
        "OutOfMemory",
        0,
        0,
    ),
    (
        "rule",
        "print('CUDA error: uncorrectable ECC error'); raise SystemExit(9)",
        {},
        {"rules": [{"name": "ecc", "onMessages": ["ECC error"], "action": "FailJob"}]},
        "Unknown",
        "NonRetriableExitCode",
        0,
        0,
    ),
]


def test_every_final_row_of_the_exit_table(jobs: Namespace) -> None:
    for name, script, more, policy, *_ in FINAL:
        jobs.create(name, trainer=playing(script, **more), failurePolicy=policy)
    for name, _, _, _, failure_class, reason, restarts, counted in FINAL:
        status = jobs.ended(name)
        assert status["phase"] == "Failed", name
        assert condition(status, "Failed") == ("True", reason), name
        assert status["attempts"][0]["failureClass"] == failure_class, name
        assert (status["restarts"], status["restartsCounted"]) == (restarts, counted), name
        assert jobs.events(name, "AttemptFailed"), name


def test_the_earliest_failure_of_two_pods_is_the_cause(jobs: Namespace) -> None:
    jobs.create("pair", trainer=playing("end(12, 'Diverged') if index == 1 else wait()", nodes=2))
    status = jobs.ended("pair")
    assert status["attempts"][0]["failureClass"] == "Diverged"
    assert len(status["attempts"][0]["podUids"]) == 2


def test_an_evicted_pod_restarts_the_job_without_counting(jobs: Namespace) -> None:
    script = "wait() if attempt == 1 else end(11, 'Invalid')"
    jobs.create("evicted", trainer=playing(script), failurePolicy={"maxRestarts": 0})
    jobs.wait("rewardmodeljob/evicted", "condition=PodsReady")
    jobs.evict(jobs.pods("evicted")[0]["metadata"]["name"])
    status = jobs.ended("evicted")
    first = status["attempts"][0]
    assert (first["failureClass"], first["counted"]) == ("Infrastructure", False)
    assert (status["restarts"], status["restartsCounted"]) == (1, 0)


def test_a_deleted_pod_is_a_preemption_that_does_not_count(jobs: Namespace) -> None:
    script = "wait() if attempt == 1 else end(11, 'Invalid')"
    jobs.create("deleted", trainer=playing(script), failurePolicy={"maxRestarts": 0})
    jobs.wait("rewardmodeljob/deleted", "condition=PodsReady")
    jobs.kubectl("delete", "pod", "-l", "rlhf.dev/name=deleted", "--wait=false")
    status = jobs.ended("deleted")
    first = status["attempts"][0]
    assert (first["failureClass"], first["counted"]) == ("Preempted", False)
    assert (status["restarts"], status["restartsCounted"]) == (1, 0)


def test_suspend_ends_the_pods_and_resume_is_a_new_attempt(jobs: Namespace) -> None:
    jobs.create("pause", trainer=playing("wait() if attempt == 1 else succeed()"))
    jobs.wait("rewardmodeljob/pause", "condition=PodsReady")
    jobs.patch("pause", suspend=True)
    jobs.wait("rewardmodeljob/pause", "condition=Suspended")
    # Suspended says that nothing runs; the garbage collector may still be about to take the ended pod away.
    assert {pod["status"]["phase"] for pod in jobs.pods("pause")} <= {"Succeeded", "Failed"}
    eventually("the pods are gone", lambda: not jobs.pods("pause"))
    assert jobs.status("pause")["phase"] == "Suspended"
    jobs.patch("pause", suspend=False)
    status = jobs.ended("pause", "Complete")
    assert (status["attempt"], status["restarts"]) == (2, 0)
    assert status["phase"] == "Succeeded"


def test_deadlines_fail_a_job_and_its_pods_go(jobs: Namespace) -> None:
    nowhere = playing("succeed()")
    nowhere["podTemplate"]["spec"]["nodeSelector"] = {"no": "such-node"}
    jobs.create("waiting", trainer=nowhere, preRunningDeadlineSeconds=4)
    jobs.create("slow", trainer=playing("wait()"), activeDeadlineSeconds=4)
    assert condition(jobs.ended("waiting"), "Failed") == ("True", "PreRunningDeadlineExceeded")
    assert condition(jobs.ended("slow"), "Failed") == ("True", "DeadlineExceeded")
    eventually("their pods are gone", lambda: not jobs.pods("waiting") + jobs.pods("slow"))


def test_the_time_to_live_deletes_children_and_not_the_job(jobs: Namespace) -> None:
    jobs.create("brief", trainer=playing("succeed()"), ttlSecondsAfterFinished=3)
    jobs.ended("brief", "Complete")
    jobs.wait("job/brief-train-a1", "delete")
    jobs.wait("configmap/brief-train-a1", "delete")
    status = jobs.status("brief")
    assert (status["phase"], status["attempt"]) == ("Succeeded", 1)


def test_a_launcher_that_ignores_its_environment_is_found_out(jobs: Namespace) -> None:
    jobs.create("alone", trainer=playing("serve(1); wait()", nodes=2))
    status = jobs.ended("alone")
    assert condition(status, "Failed") == ("True", "RendezvousMismatch")


def test_progress_is_pulled_from_rank_0(jobs: Namespace) -> None:
    jobs.create("report", trainer=playing("serve(2) if index == 0 else None; wait()", nodes=2))
    jobs.wait("rewardmodeljob/report", "jsonpath={.status.phase}=Running")
    assert jobs.status("report")["progress"]["totalSteps"] == 9


def test_lost_messages_are_read_again_from_storage(jobs: Namespace) -> None:
    """An ending that left result.json but no termination message."""
    script = """
    path = f"{config['output']['path']}/a{attempt}"
    os.makedirs(path)
    body = {"failureClass": "Success", "reason": "Success", "message": "stored", "exitCode": 0, "attempt": attempt,
            "uid": config["uid"], "finishedAt": now(),
            "artifact": {"path": f"{path}/artifact", "digest": "sha256:" + "e" * 64}}
    open(f"{path}/result.json", "w").write(json.dumps(body))
    """
    jobs.create("stored", trainer=playing(script))
    status = jobs.ended("stored", "Complete")
    assert status["artifact"]["digest"] == "sha256:" + "e" * 64


GATE = """
end(10, 'GateFailed', artifact={"path": f"{config['output']['path']}/a1/artifact", "digest": "sha256:" + "a" * 64},
    verdicts=[{"metric": "accuracy", "state": "Fail", "n": 90, "lower": 0.5, "upper": 0.6, "threshold": 0.65}])
"""


def test_a_policy_waits_for_its_reward_model_until_the_gate_is_waived(jobs: Namespace) -> None:
    jobs.create("rm", trainer=playing(GATE))
    trainer = playing("succeed()")
    jobs.create("tuned", "PolicyOptimizationJob", rewardModel={"jobRef": {"name": "rm"}}, trainer=trainer)
    status = jobs.ended("rm")
    assert condition(status, "Validated") == ("False", "RewardGateFailed")
    why = "jsonpath={.status.conditions[?(@.type=='Progressing')].reason}=WaitingForUpstream"
    jobs.wait("policyoptimizationjob/tuned", why)
    assert jobs.pods("tuned") == []
    jobs.decide("good-enough", "RewardModelJob", "rm", "Waive", digest=status["artifact"]["digest"])
    jobs.wait("policyoptimizationjob/tuned", "condition=Complete")
    tuned = jobs.status("tuned", "policyoptimizationjob")
    assert tuned["lineage"]["rewardModel"] == status["artifact"]["digest"]
    assert condition(jobs.status("rm"), "Validated") == ("True", "Waived")


def test_a_paused_guardrail_goes_on_when_acknowledged(jobs: Namespace) -> None:
    jobs.create("careful", trainer=playing("end(14, 'GuardrailPaused') if attempt == 1 else succeed()"))
    jobs.wait("rewardmodeljob/careful", "condition=Suspended")
    assert condition(jobs.status("careful"), "GuardrailsHealthy") == ("False", "GuardrailBreached")
    jobs.decide("seen", "RewardModelJob", "careful", "Acknowledge", attempt=1)
    status = jobs.ended("careful", "Complete")
    assert status["attempts"][0]["releasedBy"] == "seen"
