"""What the operator writes on a real API server, counted in its audit log, and what it leaves alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime

import pytest
import yaml

from rlhf_operator.api.decision import admission_policy, admission_policy_binding
from rlhf_operator.kinds.base import CONFIG_MAP, JOB
from rlhf_operator.kube.errors import ApiError
from tests.cluster.test_operator.world import WIDGETS, Cluster, Operators, quiet, until, writes

REST_SECONDS = 60.0


def named(count: int, prefix: str = "w") -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


async def test_nothing_is_written_at_rest(world: Cluster, operators: Operators, control_plane) -> None:
    names = named(200)
    replica = await operators.start(relistSeconds=15)
    await world.create(names)
    await until(lambda: world.all_in("Running", 200), "200 widgets run", log=replica.log)
    await quiet(replica)
    since = datetime.now(UTC)

    await asyncio.sleep(REST_SECONDS)  # the measurement itself

    seen = list(control_plane.requests(since=since))
    leases = [r for r in seen if r.resource == "leases" and r.is_write and r.namespace == world.namespace]
    assert writes(seen, world.namespace) == []
    assert len(leases) > REST_SECONDS / 4, "the operator was not alive"
    assert await replica.metric("rlhf_operator_store_ghosts_total") == 0


async def test_a_life_costs_its_children_and_four_more_writes(
    world: Cluster, operators: Operators, control_plane
) -> None:
    replica = await operators.start()
    since = datetime.now(UTC)
    await world.create(["solo"])
    await until(lambda: world.all_in("Running", 1), "it runs", log=replica.log)
    await until(lambda: _has_jobs(world, 1), "its job is there", log=replica.log)
    await world.end_job("solo-a1", "Complete")
    await until(lambda: world.all_in("Succeeded", 1), "it succeeds", log=replica.log)
    await quiet(replica)

    made = writes(control_plane.requests(since=since), world.namespace)
    counts = Counter((r.verb, r.resource, r.subresource) for r in made)
    status = counts[("patch", "widgets", "status")]
    children = counts[("create", "jobs", "")] + counts[("patch", "configmaps", "")]
    events = counts[("create", "events", "")]
    assert (children, status, events) == (2, 2, 2)
    assert children + status + events <= 2 + 4


async def test_decisions_are_honoured_only_while_their_policy_is_in_force(operators: Operators, kubectl) -> None:
    policies = ("delete", "validatingadmissionpolicies,validatingadmissionpolicybindings", "--all")
    kubectl(*policies)  # other tests share the API server and leave theirs
    replica = await operators.start()

    def honoured(expected: float):
        async def holds() -> bool:
            return await replica.metric("rlhf_operator_decisions_honoured") == expected

        return holds

    await until(honoured(0), "there is no policy yet", log=replica.log)
    kubectl("apply", "-f", "-", input=yaml.safe_dump_all([admission_policy(), admission_policy_binding()]))
    try:
        await until(honoured(1), "the policy was seen", log=replica.log)
        audit_only = {**admission_policy_binding()["spec"], "validationActions": ["Audit"]}
        kubectl("apply", "-f", "-", input=yaml.safe_dump({**admission_policy_binding(), "spec": audit_only}))
        await until(honoured(0), "a policy that only audits binds nobody", log=replica.log)
    finally:
        kubectl(*policies)


async def test_fields_of_others_are_left_alone(world: Cluster, operators: Operators) -> None:
    replica = await operators.start()
    await world.create(["shared"], color="red")
    await until(lambda: world.all_in("Running", 1), "it runs", log=replica.log)
    await until(lambda: _has_config(world, "shared-config", "red"), "its config is there", log=replica.log)
    mark = {"metadata": {"labels": {"team": "desk"}, "annotations": {"note": "mine"}}, "data": {"extra": "theirs"}}
    await world.api.merge(CONFIG_MAP, world.namespace, "shared-config", mark)
    await world.api.merge(JOB, world.namespace, "shared-a1", {"spec": {"suspend": True}})

    live = await world.api.get(WIDGETS, world.namespace, "shared")
    await world.api.replace(WIDGETS, {**live, "spec": {**live["spec"], "color": "blue"}})
    await until(lambda: _has_config(world, "shared-config", "blue"), "the colour arrives", log=replica.log)
    await world.api.merge(CONFIG_MAP, world.namespace, "shared-config", {"data": {"color": "black"}})
    await until(lambda: _has_config(world, "shared-config", "blue"), "what is ours is put back", log=replica.log)

    config = await world.api.get(CONFIG_MAP, world.namespace, "shared-config")
    job = await world.api.get(JOB, world.namespace, "shared-a1")
    assert config["metadata"]["labels"]["team"] == "desk"
    assert config["metadata"]["annotations"]["note"] == "mine"
    assert config["data"] == {"color": "blue", "extra": "theirs"}
    assert job["spec"]["suspend"] is True


async def test_what_is_not_ours_is_not_touched(world: Cluster, operators: Operators) -> None:
    await world.api.create(
        CONFIG_MAP,
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "victim-config", "namespace": world.namespace},
            "data": {"color": "precious"},
        },
    )
    replica = await operators.start()
    await world.create(["victim"], color="red")

    async def refused() -> bool:
        conditions = ((await world.widgets())["victim"].get("status") or {}).get("conditions") or []
        return any((c["type"], c["status"], c["reason"]) == ("Accepted", "False", "ForeignOwner") for c in conditions)

    await until(refused, "the condition says ForeignOwner", log=replica.log)
    untouched = await world.api.get(CONFIG_MAP, world.namespace, "victim-config")
    assert untouched["data"] == {"color": "precious"}
    assert "labels" not in untouched["metadata"]
    await world.api.delete(CONFIG_MAP, world.namespace, "victim-config")
    live = await world.api.get(WIDGETS, world.namespace, "victim")
    await world.api.replace(WIDGETS, {**live, "spec": {**live["spec"], "color": "blue"}})
    await until(lambda: _has_config(world, "victim-config", "blue"), "the way is free", log=replica.log)


async def test_unknown_fields_of_a_spec_are_refused_for_strict_clients(world: Cluster, kubectl) -> None:
    manifest = "apiVersion: rlhf.dev/v1alpha1\nkind: Widget\nmetadata: {name: typo}\nspec: {colour: red}\n"

    done = kubectl("-n", world.namespace, "apply", "-f", "-", input=manifest, check=False)

    assert done.returncode != 0
    assert 'unknown field "spec.colour"' in done.stderr
    with pytest.raises(ApiError, match="not found"):
        await world.api.merge(WIDGETS, world.namespace, "typo", {})


async def _has_jobs(world: Cluster, count: int) -> bool:
    return len(await world.jobs()) == count


async def _has_config(world: Cluster, name: str, color: str) -> bool:
    found = await world.api.get(CONFIG_MAP, world.namespace, name)
    return found is not None and found["data"].get("color") == color
