"""Jobs whose inputs are in an object store: what pods get for it, what is refused, what the status says."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_trainer.wire import AttemptConfig
from tests.unit.jobs_world import World, digest, policy_spec, reward_spec, stored_spec

SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def ticked(spec: dict[str, Any], kind: str = "RewardModelJob") -> World:
    world = World(spec, kind=kind)
    world.tick()
    return world


def container_of(world: World) -> dict[str, Any]:
    (container,) = world.job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def env_of(world: World) -> dict[str, Any]:
    return {entry["name"]: entry for entry in container_of(world)["env"] if entry["name"].startswith("AWS_")}


def template(**container: Any) -> dict[str, Any]:
    return {"numNodes": 2, "podTemplate": {"spec": {"containers": [{"name": "trainer", **container}]}}}


def test_pods_get_three_keys_of_the_secret_and_nothing_else_of_it() -> None:
    world = ticked(stored_spec())
    env = env_of(world)
    assert set(env) == {"AWS_ENDPOINT_URL", *SECRET}
    assert env["AWS_ENDPOINT_URL"] == {"name": "AWS_ENDPOINT_URL", "value": "https://minio.storage.svc:9000"}
    for name in SECRET:
        found = env[name]["valueFrom"]["secretKeyRef"]
        optional = {"optional": True} if name == "AWS_SESSION_TOKEN" else {}
        assert found == {"name": "desk-store", "key": name, **optional}
        assert "value" not in env[name]
    assert "envFrom" not in container_of(world)
    assert "desk-store" not in str([*world.children["ConfigMap"].values(), world.status]), "only the pod names it"


def test_status_and_configuration_have_the_uris_that_the_user_wrote() -> None:
    world = ticked(stored_spec())
    assert world.status["inputs"] == {
        "baseModel": {"uri": "s3://models/desk/sft", "digest": digest("a")},
        "preferences": {"uri": "s3://feedback/desk.jsonl", "digest": digest("b")},
    }
    assert world.status["lineage"]["preferences"] == digest("b")
    assert "scratch" not in str(world.status)
    config = AttemptConfig.model_validate_json(world.children["ConfigMap"]["rm-train-a1"]["data"]["attempt.json"])
    assert config.preferences is not None
    assert (config.preferences.uri, config.preferences.path) == (
        "s3://feedback/desk.jsonl",
        "/mnt/rlhf/scratch/preferences/desk.jsonl",
    )


def test_where_data_lies_is_no_part_of_what_a_run_is() -> None:
    """Equal digests are equal data: a run that moves from a volume to a store resumes from its checkpoints."""
    assert ticked(stored_spec()).status["lineage"] == ticked(reward_spec()).status["lineage"]


def test_no_scratch_and_no_credentials_without_an_input_that_needs_them() -> None:
    world = ticked(reward_spec())
    assert env_of(world) == {}
    assert "scratch" not in str(world.job)


def test_without_a_secret_the_pods_have_what_their_service_account_gives_them() -> None:
    identity = {"numNodes": 2, "podTemplate": {"spec": {"serviceAccountName": "desk-reader"}}}
    spec = stored_spec(trainer=identity)
    del spec["objectStore"]
    world = ticked(spec)
    assert env_of(world) == {}
    assert world.job["spec"]["template"]["spec"]["serviceAccountName"] == "desk-reader"


def test_the_scratch_volume_can_be_replaced_by_a_larger_one() -> None:
    claim = {"volumeClaimTemplate": {"spec": {"resources": {"requests": {"storage": "200Gi"}}}}}
    larger = {"name": "scratch", "ephemeral": claim}
    world = ticked(stored_spec(trainer={"numNodes": 2, "podTemplate": {"spec": {"volumes": [larger]}}}))
    volumes = {volume["name"]: volume for volume in world.job["spec"]["template"]["spec"]["volumes"]}
    assert volumes["scratch"] == {"name": "scratch", "ephemeral": claim}


def test_a_scratch_volume_that_pods_would_share_is_refused() -> None:
    shared = {"name": "scratch", "persistentVolumeClaim": {"claimName": "cache"}}
    world = ticked(stored_spec(trainer={"numNodes": 2, "podTemplate": {"spec": {"volumes": [shared]}}}))
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert "use ephemeral, which makes a claim for each pod" in world.condition("Accepted")["message"]


def test_a_sidecar_may_have_a_store_of_its_own() -> None:
    env = [{"name": "AWS_ACCESS_KEY_ID", "value": "x"}]
    template = {"spec": {"containers": [{"name": "log-shipper", "image": "shipper", "env": env}]}}
    world = ticked(stored_spec(trainer={"numNodes": 2, "podTemplate": template}))
    assert world.holds("Accepted")[0] == "True"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", *SECRET])
def test_a_template_that_sets_what_the_store_sets_is_refused(name: str) -> None:
    world = ticked(stored_spec(trainer=template(env=[{"name": name, "value": "x"}])))
    assert world.holds("Accepted") == ("False", "InvalidData")
    assert f"spec.trainer.podTemplate sets {name}, which the operator sets" in world.condition("Accepted")["message"]
    assert not any(world.children.values())


def test_a_template_may_set_what_the_store_does_not() -> None:
    world = ticked(stored_spec(trainer=template(env=[{"name": "AWS_REGION", "value": "eu-north-1"}])))
    assert world.holds("Accepted")[0] == "True"
    assert env_of(world)["AWS_REGION"]["value"] == "eu-north-1"


def test_every_input_of_a_policy_may_be_stored() -> None:
    stored = {
        "policy": {"uri": "s3://m/sft", "digest": digest("1")},
        "rewardModel": {"uri": "s3://m/rm", "digest": digest("2")},
        "auditRewardModel": {"uri": "s3://m/audit", "digest": digest("3")},
        "prompts": {"uri": "s3://f/prompts.jsonl", "digest": digest("4")},
    }
    judge = {"uri": "s3://m/safety.json", "digest": digest("5")}
    suite = {"uri": "s3://m/suite.jsonl", "digest": digest("6")}
    evaluation = {"safetyFilter": judge, "safetySuite": {**suite, "maxViolationRate": 0.05}}
    world = ticked(policy_spec(**stored, evaluation=evaluation), "PolicyOptimizationJob")
    assert world.status["inputs"] == {**stored, "safetyFilter": judge, "safetySuite": suite}
    claims = [v for v in world.job["spec"]["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert len(claims) == 1, "of the output alone"


def test_a_pod_without_its_secret_says_so() -> None:
    world = ticked(stored_spec())
    world.run_pods()
    waits = {"reason": "CreateContainerConfigError", "message": 'secret "desk-store" not found'}
    for pod in world.children["Pod"].values():
        pod["status"] = {
            "phase": "Pending",
            "containerStatuses": [{"name": "trainer", "state": {"waiting": waits}}],
        }
    world.tick()
    assert world.holds("PodsReady") == ("False", "CreateContainerConfigError")
    assert 'secret "desk-store" not found; it starts once that is there' in world.condition("PodsReady")["message"]
