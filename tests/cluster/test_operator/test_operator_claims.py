"""The operator as it is shipped, with its generated role, on claims of a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds import KINDS, reward_model_job
from rlhf_operator.kinds.base import JOB, PERSISTENT_VOLUME_CLAIM
from tests.cluster.samples import CRDS, changed, example
from tests.cluster.test_operator.world import Cluster, Operators, grant, quiet, until, writes
from tests.property import cluster

OPERATOR = "claims-operator"
RMJ = primary_resource(reward_model_job.SPEC)
Dict = dict[str, Any]


class Malformed(NamedTuple):
    """A job that the API server cannot refuse: it does not see the claim."""

    name: str
    field: str
    nodes: int
    modes: tuple[str, ...]
    message: str


MALFORMED = (
    Malformed("once-out", "output", 2, ("ReadWriteOnce",), "name a claim with ReadWriteMany, or set numNodes to 1"),
    Malformed("pod-out", "output", 2, ("ReadWriteOncePod",), "name a claim with ReadWriteMany, or set numNodes to 1"),
    Malformed("read-out", "output", 1, ("ReadOnlyMany",), "a run writes its checkpoints there"),
    Malformed("once-in", "preferences", 2, ("ReadWriteOnce",), "ReadWriteMany or ReadOnlyMany"),
)


def job(name: str, namespace: str, nodes: int, **claims: str) -> Dict:
    """The example with fields of its spec in other claims."""
    uris = {f"spec.{field}.uri": f"pvc://{claim}/x" for field, claim in claims.items()}
    named = {"metadata.name": name, "metadata.namespace": namespace, "spec.trainer.numNodes": nodes}
    return changed(example("reward-model-job"), {**named, **uris})


@pytest.fixture
async def shipped(control_plane, namespace: str, tmp_path: Path) -> AsyncIterator[Operators]:
    control_plane.install_crds(CRDS)
    kubeconfig = grant(control_plane, OPERATOR, KINDS)
    async with aiohttp.ClientSession() as http:
        made = Operators(kubeconfig, namespace, tmp_path, http, module="rlhf_operator")
        try:
            yield made
        finally:
            made.end()


async def test_claims_that_pods_cannot_share_are_refused_and_missing_ones_waited_for(
    world: Cluster, shipped: Operators, control_plane
) -> None:
    api, namespace = world.api, world.namespace
    shared = job("waits", namespace, 2, output="late")
    for claim in cluster.claims_for(shared):
        if claim["metadata"]["name"] != "late":
            await api.create(PERSISTENT_VOLUME_CLAIM, claim)
    replica = await shipped.start()
    await api.create(RMJ, shared)
    for row in MALFORMED:
        await api.create(PERSISTENT_VOLUME_CLAIM, cluster.claim(namespace, row.name, *row.modes))
        await api.create(RMJ, job(row.name, namespace, row.nodes, **{row.field: row.name}))

    async def told(name: str, type: str, reason: str) -> bool:
        return (await _condition(world, name, type)).get("reason") == reason

    for row in MALFORMED:
        await until(partial(told, row.name, "Accepted", "InvalidData"), row.name, log=replica.log)
        message = (await _condition(world, row.name, "Accepted"))["message"]
        assert f"PersistentVolumeClaim {row.name} offers {row.modes[0]} only" in message
        assert row.message in message
    await until(lambda: told("waits", "Progressing", "WaitingForClaim"), "it waits", log=replica.log)
    assert "late (of spec.output.uri) not found" in (await _condition(world, "waits", "Progressing"))["message"]
    assert (await api.list_metadata(JOB, namespace)).items == []
    await quiet(replica)

    await api.create(PERSISTENT_VOLUME_CLAIM, cluster.claim(namespace, "late"))

    await until(lambda: _exists(world, "waits-train-a1"), "its attempt starts", log=replica.log)
    await quiet(replica)
    made = writes(control_plane.requests(), namespace, OPERATOR)
    assert [r.name for r in made if (r.verb, r.resource) == ("create", "jobs")] == ["waits-train-a1"]
    assert not [r for r in made if r.resource == PERSISTENT_VOLUME_CLAIM.plural]


async def _condition(world: Cluster, name: str, type: str) -> Dict:
    live = await world.api.get(RMJ, world.namespace, name) or {}
    found = (c for c in live.get("status", {}).get("conditions", ()) if c["type"] == type)
    return next(found, {})


async def _exists(world: Cluster, name: str) -> bool:
    return await world.api.get(JOB, world.namespace, name) is not None
