"""Claims that the pods of a job cannot share are refused, and claims that are not there are waited for."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_operator.engine.slim import slim
from rlhf_operator.engine.store import Store
from rlhf_operator.kinds import KINDS
from rlhf_operator.kinds.base import Key
from rlhf_operator.kinds.training.claims import claim_key, claims_named
from tests.property import cluster
from tests.unit.jobs_world import UID, World, digest, policy_spec, reward_spec

ONCE, POD_ONCE, MANY, READ = "ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"
OUTPUT, DATA = "artifacts", "feedback"


def world(nodes: int, claim: str, *modes: str) -> World:
    made = World(reward_spec(trainer={"numNodes": nodes}))
    made.related[claim_key("ml", claim)] = cluster.claim("ml", claim, *modes)
    return made


@pytest.mark.parametrize(
    ("nodes", "claim", "modes", "remedy"),
    [
        (2, OUTPUT, (ONCE,), "name a claim with ReadWriteMany, or set numNodes to 1"),
        (2, OUTPUT, (POD_ONCE,), "name a claim with ReadWriteMany, or set numNodes to 1"),
        (2, OUTPUT, (ONCE, READ), "name a claim with ReadWriteMany, or set numNodes to 1"),
        (2, OUTPUT, (READ,), "a run writes its checkpoints there"),
        (1, OUTPUT, (READ,), "a run writes its checkpoints there"),
        (2, DATA, (ONCE,), "name a claim with ReadWriteMany or ReadOnlyMany, or set numNodes to 1"),
        (2, DATA, (POD_ONCE,), "name a claim with ReadWriteMany or ReadOnlyMany, or set numNodes to 1"),
    ],
)
def test_a_claim_that_the_pods_cannot_mount_is_refused(
    nodes: int, claim: str, modes: tuple[str, ...], remedy: str
) -> None:
    made = world(nodes, claim, *modes)
    made.tick()

    assert made.holds("Accepted") == ("False", "InvalidData")
    message = made.condition("Accepted")["message"]
    field = "spec.output.uri" if claim == OUTPUT else "input preferences"
    assert message.startswith(f"{field}: PersistentVolumeClaim {claim} offers {', '.join(modes)} only; ")
    assert remedy in message
    assert made.status["attempt"] == 0
    assert not any(made.children.values())
    assert {event.reason for event in made.events if event.type == "Warning"} == {"InvalidData"}


@pytest.mark.parametrize(
    ("nodes", "claim", "modes"),
    [
        (2, OUTPUT, (MANY,)),
        (2, OUTPUT, (ONCE, MANY)),
        (1, OUTPUT, (ONCE,)),
        (1, OUTPUT, (POD_ONCE,)),
        (2, DATA, (READ,)),
        (2, DATA, (ONCE, READ)),
        (1, DATA, (ONCE,)),
    ],
)
def test_any_other_claim_is_accepted(nodes: int, claim: str, modes: tuple[str, ...]) -> None:
    made = world(nodes, claim, *modes)
    made.tick()

    assert made.holds("Accepted") == ("True", "AsExpected")
    assert made.status["attempt"] == 1


def test_a_claim_that_is_read_and_written_must_be_writable() -> None:
    made = World(reward_spec(trainer={"numNodes": 2}, output={"uri": f"pvc://{DATA}/out"}))
    made.related[claim_key("ml", DATA)] = cluster.claim("ml", DATA, READ)
    made.tick()

    assert made.condition("Accepted")["message"].startswith("spec.output.uri: ")


def test_a_claim_that_can_be_shared_lifts_the_refusal() -> None:
    made = world(2, OUTPUT, ONCE)
    made.tick()
    made.related[claim_key("ml", OUTPUT)] = cluster.claim("ml", OUTPUT, MANY)
    made.tick()

    assert made.holds("Accepted") == ("True", "AsExpected")
    assert made.status["attempt"] == 1


def test_a_claim_that_is_not_there_is_waited_for_by_name() -> None:
    made = World()
    made.related = {claim_key("ml", OUTPUT): None, claim_key("ml", DATA): None}
    made.tick()

    assert made.phase == "Pending"
    assert made.holds("Accepted")[0] == "True"
    assert made.holds("Progressing") == ("False", "WaitingForClaim")
    message = made.condition("Progressing")["message"]
    assert message.startswith(
        "PersistentVolumeClaims artifacts (of spec.output.uri), feedback (of input preferences) not found in this "
        "namespace: no pod that mounts it could leave Pending"
    )
    assert not any(made.children.values())
    assert [event.reason for event in made.events] == ["WaitingForClaim"]
    made.related.clear()
    made.tick()
    assert made.status["attempt"] == 1


def test_a_run_that_began_is_not_disturbed_by_what_becomes_of_its_claim() -> None:
    made = World()
    made.tick()
    made.run_pods()
    made.related[claim_key("ml", OUTPUT)] = None
    before = dict(made.status)
    plan = made.tick()

    assert made.status == before
    assert not plan.delete
    assert made.children["Job"]


def test_the_claims_of_a_job_are_those_of_its_data() -> None:
    spec = policy_spec(
        evaluation={"safetyFilter": {"uri": "pvc://filters/f", "digest": digest("e")}},
        trainer={"podTemplate": {"spec": {"volumes": [{"uri": "pvc://other/x"}]}}},
    )
    status = {"inputs": {"rewardModel": {"uri": "pvc://upstream/rm"}}}
    job = {"metadata": {"namespace": "ml", "name": "p"}, "spec": spec, "status": status}

    assert {key.name for key in claims_named(job)} == {"models", "feedback", "artifacts", "filters", "upstream"}


@pytest.mark.parametrize("spec", [None, [], {"output": {"uri": 7}}, {"output": {"uri": "s3://b/c"}}, {"a": [["x"]]}])
def test_a_spec_of_anything_names_no_claims_and_raises_nothing(spec: Any) -> None:
    assert claims_named({"metadata": {"namespace": "ml"}, "spec": spec}) == frozenset()


# In the store.

RM, PPO = Key("RewardModelJob", "ml", "rm"), Key("PolicyOptimizationJob", "ml", "ppo")


def stored() -> Store:
    """A policy job that takes the reward model of a job whose output it does not itself name."""
    store = Store(KINDS)
    store.put(_job(RM, reward_spec(output={"uri": "pvc://upstream/rm"})))
    store.put(_job(PPO, policy_spec()))
    return store


def _job(key: Key, spec: dict[str, Any], version: str = "1") -> dict[str, Any]:
    metadata = {"namespace": key.namespace, "name": key.name, "uid": f"{UID}-{key.name}", "resourceVersion": version}
    return {"apiVersion": "rlhf.dev/v1alpha1", "kind": key.kind, "metadata": metadata, "spec": spec}


def _claim(name: str, version: str = "2", **more: Any) -> dict[str, Any]:
    made = cluster.claim("ml", name) | more
    return made | {"metadata": made["metadata"] | {"uid": name, "resourceVersion": version}}


def test_claims_wake_who_names_them_and_who_takes_what_is_in_them() -> None:
    store = stored()
    assert store.related(PPO)[claim_key("ml", "upstream")] is None

    assert store.put(_claim("upstream")) == {RM, PPO}
    assert store.put(_claim("artifacts")) == {PPO}
    assert store.put(_claim("nobody's")) == frozenset()
    assert store.put(_claim("upstream", "3", status={"phase": "Bound"})) == frozenset(), "nothing that is read"
    found = store.related(PPO)
    assert found[claim_key("ml", "upstream")]["spec"] == {"accessModes": [MANY]}
    assert RM in found
    assert store.remove(_claim("upstream", "4")) == {RM, PPO}


def test_a_rollout_does_not_look_at_claims() -> None:
    store = stored()
    rollout = Key("PolicyRollout", "ml", "desk")
    store.put(_job(rollout, {"policy": {"jobRef": {"name": "ppo"}}}))

    assert set(store.related(rollout)) == {PPO}
    assert store.put(_claim("artifacts")) == {PPO}


def test_of_a_claim_little_is_kept() -> None:
    metadata = {"labels": {"a": "b"}, "annotations": {"c": "d"}, "deletionTimestamp": "2026-01-01T00:00:00Z"}
    raw = _claim("x", spec={"accessModes": [MANY], "volumeName": "v", "resources": {}}, status={"phase": "Bound"})
    raw["metadata"] |= metadata

    assert slim(raw) == {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "namespace": "ml",
            "name": "x",
            "uid": "x",
            "resourceVersion": "2",
            "deletionTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"accessModes": [MANY]},
    }
