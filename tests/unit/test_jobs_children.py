"""The children of an attempt, byte for byte; and the parts they are built from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_operator.api.training import TrainerSpec
from rlhf_operator.kinds.base import Prices
from rlhf_operator.kinds.training.merge import merge
from rlhf_operator.kinds.training.resources import Shape, quantity, shape
from rlhf_operator.kinds.training.storage import BadUri, Volume, input_path, mounts, place_of, uri_of
from rlhf_trainer.wire import AttemptConfig
from tests.unit.jobs_world import UID, World, digest, policy_spec, reward_spec, started, stored_spec

GOLDEN = Path(__file__).parent / "golden"


def world_of(kind: str) -> World:
    if kind == "RewardModelJob":
        world = World(reward_spec())
    elif kind == "RewardModelJob-s3":
        world = World(stored_spec())
    else:
        trainer = {
            "numNodes": 1,
            "numProcPerNode": 2,
            "image": "registry.example/trainer:1",
            "resourcesPerNode": {"limits": {"cpu": 4, "memory": "8Gi"}},
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
            "podTemplate": {
                "spec": {
                    "priorityClassName": "batch",
                    "restartPolicy": "Always",
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "containers": [
                        {"name": "trainer", "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]},
                        {"name": "sidecar", "image": "logs:1"},
                    ],
                    "volumes": [{"name": "cache", "emptyDir": {}}],
                }
            },
        }
        judge = {"uri": "pvc://models/safety-filter.json", "digest": digest("5")}
        suite = {"uri": "s3://red-team/suite.jsonl", "digest": digest("6"), "maxViolationRate": 0.01}
        evaluation = {"safetyFilter": judge, "safetySuite": suite}
        world = World(policy_spec(trainer=trainer, evaluation=evaluation), kind=kind)
        world.upstream()
    world.tick()
    return world


@pytest.mark.parametrize("kind", ["RewardModelJob", "RewardModelJob-s3", "PolicyOptimizationJob"])
def test_children_are_exactly_these(kind: str) -> None:
    """With UPDATE_GOLDEN set the files are written anew, for a reader to judge the difference."""
    made = world_of(kind).children
    found = [child for name in ("ConfigMap", "Service", "Job") for child in made[name].values()]
    for child in found:
        for field in ("uid", "creationTimestamp", "ownerReferences"):
            del child["metadata"][field]
        if child["kind"] == "ConfigMap":
            child["data"]["attempt.json"] = json.loads(child["data"]["attempt.json"])
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    path = GOLDEN / f"{kind}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_the_config_is_what_the_trainer_reads() -> None:
    world = world_of("PolicyOptimizationJob")
    config = AttemptConfig.model_validate_json(world.children["ConfigMap"]["rm-tune-a1"]["data"]["attempt.json"])
    assert config.world_size == 2
    assert config.output.path == f"/mnt/rlhf/out/artifacts/rm/{UID}"
    assert config.reward_model is not None
    assert config.reward_model.path == "/mnt/rlhf/in/artifacts/rm/a1/artifact"
    assert config.policy_training is not None
    assert config.grace_seconds == 120


def test_the_config_digest_is_of_what_shapes_the_weights() -> None:
    def digest_of(**changes: Any) -> str:
        world = World(reward_spec(**changes))
        world.tick()
        return str(world.status["lineage"]["config"])

    same = digest_of()
    assert digest_of(validation={"minAccuracy": 0.9}) == same
    assert digest_of(checkpoints={"everySteps": 5}, trainer={"numNodes": 1}) == same
    assert digest_of(training={"seed": 1}) != same
    assert digest_of(preferences={"uri": "pvc://feedback/desk.jsonl", "digest": "sha256:" + "0" * 64}) != same


def test_no_pod_template_changes_what_holds_the_group_together() -> None:
    override = {
        "metadata": {"labels": {"rlhf.dev/attempt": "9", "team": "desk"}},
        "spec": {"restartPolicy": "OnFailure", "subdomain": "elsewhere", "automountServiceAccountToken": True},
    }
    world = World(reward_spec(trainer={"numNodes": 2, "podTemplate": override}))
    world.tick()
    template = world.job["spec"]["template"]
    assert template["metadata"]["labels"]["rlhf.dev/attempt"] == "1"
    assert template["metadata"]["labels"]["team"] == "desk"
    assert template["spec"]["restartPolicy"] == "Never"
    assert template["spec"]["subdomain"] == "rm-train-a1"
    assert template["spec"]["automountServiceAccountToken"] is True  # theirs to decide


@pytest.mark.parametrize(
    "garbage",
    [
        [],
        "x",
        7,
        None,
        {"spec": "x"},
        {"spec": {"containers": "x"}},
        {"spec": {"containers": [None, 3, {"name": "trainer", "env": "x"}]}},
    ],
)
def test_any_pod_template_can_be_planned(garbage: Any) -> None:
    world = World(reward_spec(trainer={"podTemplate": garbage}))
    world.once()
    assert world.condition("Accepted")


def _container(**changes: Any) -> dict[str, Any]:
    """The trainer container of a job whose podTemplate changes it so."""
    world = started(reward_spec(trainer={"podTemplate": {"spec": {"containers": [{"name": "trainer", **changes}]}}}))
    [container] = world.job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_a_variable_has_one_source() -> None:
    """The API server refuses one with a value and valueFrom."""
    cpus = {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    assert [found for found in _container(env=[cpus])["env"] if found["name"] == cpus["name"]] == [cpus]


def test_openmp_shares_the_cpus_that_the_pod_template_gives() -> None:
    env = _container(resources={"limits": {"cpu": "16", "nvidia.com/gpu": "8"}})["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in env


def test_merge_lays_one_template_over_another() -> None:
    base = {
        "a": 1,
        "gone": 2,
        "containers": [{"name": "t", "image": "x", "env": [{"name": "A", "value": "1"}]}],
        "tolerations": [1],
    }
    over = {
        "gone": None,
        "b": {"c": 3},
        "containers": [{"name": "t", "env": [{"name": "A", "value": "2"}, {"name": "B"}]}, {"name": "s"}],
        "tolerations": [2],
    }
    assert merge(base, over) == {
        "a": 1,
        "b": {"c": 3},
        "containers": [
            {"name": "t", "image": "x", "env": [{"name": "A", "value": "2"}, {"name": "B"}]},
            {"name": "s"},
        ],
        "tolerations": [2],
    }
    assert base["gone"] == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), (2, 2), ("500m", 0.5), ("1Ki", 1024), ("1.5Gi", 1.5 * 2**30), ("1e3", 1000), ("2E", 2e18),
     ("x", 0), ("", 0), (True, 0), (None, 0), ("-1", 0), ("1e999", 1e21)],
)  # fmt: skip
def test_quantities(text: Any, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


def test_cost_needs_a_price_for_everything() -> None:
    shape = Shape(2, 1, {"nvidia.com/gpu": 4.0, "memory": 8 * 2.0**30})
    assert shape.cost_per_hour(Prices({"nvidia.com/gpu": 2.5})) is None
    assert shape.unpriced(Prices({"nvidia.com/gpu": 2.5})) == ("memory",)
    assert shape.cost_per_hour(Prices({"nvidia.com/gpu": 2.5, "memory": 0.01})) == pytest.approx(2 * (10 + 0.08))
    assert Shape(1, 1, {}).cost_per_hour(Prices({"cpu": 1.0})) is None


def test_one_volume_a_claim_inputs_read_only() -> None:
    volumes, volume_mounts = mounts([Volume("a", "x"), Volume("b", ""), Volume("a", "y")], Volume("b", "o"))
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes] == ["a", "b"]
    assert [(m["name"], m["mountPath"], m["readOnly"]) for m in volume_mounts] == [
        ("claim-0", "/mnt/rlhf/in/a", True),
        ("claim-1", "/mnt/rlhf/in/b", True),
        ("claim-1", "/mnt/rlhf/out/b", False),
    ]


@pytest.mark.parametrize("uri", ["", "pvc://", "pvc:///x", "s3://b/k", "pvc://c/..", "pvc://c/a//b", "pvc://c/./b"])
def test_bad_uris_are_refused(uri: str) -> None:
    with pytest.raises(BadUri, match="pvc://<claim>/<path>"):
        Volume.parse(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3://b", "s3://b/", "s3:///k", "s3://b/../k", "s3://b/a//k", "s3://b/k/"])
def test_bad_objects_are_refused(uri: str) -> None:
    with pytest.raises(BadUri, match="s3://<bucket>/<key>"):
        place_of(uri)


def test_inputs_of_a_store_never_share_a_path() -> None:
    """One key may lie below another, and two may have the same last part."""
    paths = [input_path(*named) for named in (("a", "s3://m/x"), ("b", "s3://m/x/y"), ("c", "s3://n/x"))]
    assert paths == ["/mnt/rlhf/scratch/a/x", "/mnt/rlhf/scratch/b/y", "/mnt/rlhf/scratch/c/x"]
    assert input_path("a", "pvc://models/x") == "/mnt/rlhf/in/models/x"


def test_uris_and_pod_paths_are_each_others_inverse() -> None:
    volume = Volume.parse("pvc://artifacts/rm")
    assert uri_of(volume.joined("u", "a1").at("/mnt/rlhf/out")) == "pvc://artifacts/rm/u/a1"
    assert uri_of("/mnt/rlhf/out/artifacts") == "pvc://artifacts"
    assert uri_of("/etc/passwd") is None
    assert uri_of("/mnt/rlhf/out/artifacts/../../etc") is None


@pytest.mark.parametrize(
    ("cpu", "processes", "threads"),
    [(None, 1, 1), ("250m", 1, 1), ("2", 1, 2), ("8", 4, 2), ("3", 2, 1)],
)
def test_openmp_gets_the_share_of_the_cpus_of_one_process(cpu: str | None, processes: int, threads: int) -> None:
    requests = {"cpu": cpu} if cpu else {}
    trainer = TrainerSpec.model_validate({"numProcPerNode": processes})
    assert shape(trainer, {"requests": requests}).threads == threads
