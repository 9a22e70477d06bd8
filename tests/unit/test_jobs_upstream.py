"""What a training job waits for, and specs that the API server cannot check."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_operator.kinds.base import Key
from tests.unit.jobs_world import (
    World,
    digest,
    policy_spec,
    reward_spec,
    started,
    training,
)


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


def test_two_jobs_that_wait_for_each_other_are_told_so() -> None:
    """Neither is wrong by itself, and either order of creation is usual: only both together never begin."""
    kind = "PolicyOptimizationJob"
    world = World(policy_spec(policy={"jobRef": {"name": "other"}}), kind=kind)
    world.upstream()
    world.upstream("other", kind=kind, validated=False, phase="Pending", conditions=[])
    other = world.related[Key(kind, "ml", "other")]
    assert other is not None
    me = world.primary["metadata"]["name"]
    world.tick()
    assert "in turn" not in world.condition("Progressing")["message"]
    other["spec"] = {"teacher": {"jobRef": {"name": me}}}
    world.tick()
    assert world.holds("Progressing") == ("False", "WaitingForUpstream")
    assert f"waits for {kind} {me} in turn, so neither will begin" in world.condition("Progressing")["message"]
    other["status"]["attempt"] = 1  # it began with an earlier job of this name, and will end
    world.tick()
    assert "in turn" not in world.condition("Progressing")["message"]


def test_a_job_that_waits_for_itself_is_told_so() -> None:
    world = World(policy_spec(), kind="PolicyOptimizationJob")
    me = world.primary["metadata"]["name"]
    world.primary["spec"]["policy"] = {"jobRef": {"name": me}}
    world.upstream()
    world.related[Key("PolicyOptimizationJob", "ml", me)] = world.primary
    world.tick()
    assert "in turn, so neither will begin" in world.condition("Progressing")["message"]


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


def test_a_pod_template_that_drifts_to_more_gpus_does_not_end_the_running_attempt() -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": 2}}}
    before = {"numNodes": 2, "podTemplate": {"spec": {"containers": [{"name": "trainer", **gpus}]}}}
    world = started(reward_spec(trainer=before))
    world.run_pods()
    world.report(world_size=4)
    more = {"resources": {"limits": {"nvidia.com/gpu": 4}}}
    world.edit(trainer={"numNodes": 2, "podTemplate": {"spec": {"containers": [{"name": "trainer", **more}]}}})
    world.report(step=2, world_size=4)
    assert (world.phase, world.holds("Failed")) == ("Running", ("False", "AsExpected"))
    assert world.holds("Accepted") == ("False", "DigestMismatch")
    world.edit(trainer=before)
    assert (world.phase, world.holds("Accepted")[0]) == ("Running", "True")


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
