"""What a pass does with plans that fail, foreign objects and an API server that refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_operator.api.decision import admission_policy, admission_policy_binding
from rlhf_operator.api.labels import API_VERSION
from rlhf_operator.engine.gate import BINDING, POLICY
from rlhf_operator.engine.reconciler import TERMINAL_SECONDS
from rlhf_operator.engine.sources import DECISIONS
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, SERVICE, Key, Observed, Plan
from rlhf_operator.kube.errors import ApiError, Outcome
from tests.property.memory_api import MemoryApi
from tests.property.toy import WIDGET, plan
from tests.property.world import NAMESPACE, Story, World

ADA = Key("Widget", NAMESPACE, "ada")


def widget(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": "Widget",
        "metadata": {"name": "ada", "namespace": NAMESPACE},
        "spec": spec,
    }


class RefusingApi(MemoryApi):
    """Refuses creations of Jobs with `error`."""

    error: ApiError | None = None

    async def create(self, resource, body):
        if resource == JOB and self.error is not None:
            raise self.error
        return await super().create(resource, body)


async def begun(kind=WIDGET, api: MemoryApi | None = None) -> World:
    world = World((kind,), Story([widget()]), api or MemoryApi())
    await world.begin()
    return world


def accepted(world: World) -> dict[str, Any]:
    (live,) = world.api.of("widgets")
    (found,) = [c for c in live["status"]["conditions"] if c["type"] == "Accepted"]
    return found


def events(world: World) -> list[str]:
    return [event["reason"] for event in world.api.of("events")]


async def test_a_plan_that_raises_is_shown_counted_and_retried() -> None:
    def broken(_: Observed) -> Plan:
        raise ZeroDivisionError("at heart")

    world = await begun(replace(WIDGET, plan=broken))

    for _ in range(5):
        await world.work()
        world.clock.seconds += 120

    condition = accepted(world)
    assert (condition["status"], condition["reason"]) == ("False", "InternalError")
    assert "ZeroDivisionError: at heart" in condition["message"]
    assert len([w for w in world.api.writes if w.plural == "widgets"]) == 1
    assert events(world) == ["InternalError"]
    panics = world.engine.metrics.reconcile_panics.labels("Widget")._value.get()
    assert panics == 5


async def test_a_plan_that_works_again_clears_the_condition() -> None:
    broken = [True]

    def sometimes(observed: Observed) -> Plan:
        if broken:
            raise RuntimeError("not yet")
        return plan(observed)

    world = await begun(replace(WIDGET, plan=sometimes))
    await world.work()
    broken.clear()

    await world.settle()

    assert accepted(world)["status"] == "True"
    assert world.api.of("widgets")[0]["status"]["phase"] == "Succeeded"


@pytest.mark.parametrize(
    ("error", "status", "reason", "terminal"),
    [
        (ApiError(422, "spec.x is invalid", reason="Invalid"), "False", "InvalidChild", True),
        (ApiError(403, "exceeded quota: jobs", reason="Forbidden"), "Unknown", "WaitingForQuota", False),
        (ApiError(403, "ns is ending", causes=("NamespaceTerminating",)), "Unknown", "NamespaceTerminating", False),
        (ApiError(403, "cannot create jobs", reason="Forbidden"), "False", "Forbidden", False),
    ],
)
async def test_what_the_api_server_refuses_is_told_once_and_cleared_when_it_works(
    error: ApiError, status: str, reason: str, terminal: bool
) -> None:
    api = RefusingApi()
    api.error = error
    world = await begun(api=api)
    for _ in range(4):
        await world.work()
        world.clock.seconds += 90

    found, written = accepted(world), [w for w in api.writes if w.plural == "widgets"]
    assert (found["status"], found["reason"]) == (status, reason)
    assert error.message in found["message"]
    assert len(written) == 2  # the ledger before the action, then the failure: and it does not flicker
    api.error = None
    world.clock.seconds += TERMINAL_SECONDS
    await world.settle()
    assert accepted(world)["status"] == "True"
    assert (world.engine.metrics.terminal_reconcile_errors.labels("Widget")._value.get() > 0) is terminal


@pytest.mark.parametrize(
    "error", [ApiError(422, "spec.x is invalid", reason="Invalid"), ApiError(403, "exceeded quota: jobs")]
)
async def test_a_deadline_is_kept_whatever_the_api_server_refuses(error: ApiError) -> None:
    api = RefusingApi()
    api.error = error
    world = await begun(replace(WIDGET, plan=lambda observed: replace(plan(observed), requeue_after=5.0)), api)

    while await world.work() or world.deliver():
        world.clock.seconds += 1

    deadline = world.engine.queue.next_deadline()
    assert deadline is not None
    assert deadline <= world.clock.seconds + 5.0


async def test_a_decision_that_is_older_than_its_policy_is_not_honoured() -> None:
    """Whoever made it could call themselves anything."""
    seen: list[tuple[str, ...]] = []

    def plan_and_look(observed: Observed) -> Plan:
        seen.append(tuple(decision["metadata"]["name"] for decision in observed.decisions))
        return plan(observed)

    subject = {"kind": "Widget", "name": "ada"}
    decision = {"apiVersion": API_VERSION, "kind": "Decision", "spec": {"subject": subject, "by": "the boss"}}
    world = await begun(replace(WIDGET, plan=plan_and_look))
    world.api.insert(DECISIONS, {**decision, "metadata": {"name": "forged", "namespace": NAMESPACE}})
    for resource, obj in ((POLICY, admission_policy()), (BINDING, admission_policy_binding())):
        world.api.insert(resource, {**obj, "metadata": {**obj["metadata"], "namespace": ""}})
    world.api.insert(DECISIONS, {**decision, "metadata": {"name": "bound", "namespace": NAMESPACE}})
    await world.restart()

    await world.work()

    assert seen == [("bound",)]


async def test_an_unwell_api_server_changes_no_status_and_is_tried_again() -> None:
    api = RefusingApi()
    api.error = ApiError(503, "unwell", retry_after=7.0)
    world = await begun(api=api)
    await world.work()

    assert accepted(world)["status"] == "True"
    assert world.engine.queue.next_deadline() >= world.clock.seconds + 7.0
    api.error = None
    await world.settle()
    assert world.api.of("widgets")[0]["status"]["phase"] == "Succeeded"


@pytest.mark.parametrize("owner", [None, {"kind": "Deployment", "name": "web", "uid": "other", "controller": True}])
async def test_somebody_elses_object_is_never_touched(owner: dict[str, Any] | None) -> None:
    api = MemoryApi()
    foreign = {"name": "ada-config", "namespace": NAMESPACE, "ownerReferences": [owner] if owner else []}
    api.insert(CONFIG_MAP, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": foreign, "data": {"color": "theirs"}})
    world = await begun(api=api)

    await world.work()

    assert (accepted(world)["status"], accepted(world)["reason"]) == ("False", "ForeignOwner")
    assert "'ada-config' is in the way" in accepted(world)["message"]
    (config,) = api.of("configmaps")
    assert config["data"] == {"color": "theirs"}
    assert "labels" not in config["metadata"]


async def test_a_child_that_the_kind_does_not_declare_is_a_defect_of_the_kind() -> None:
    def undeclared(observed: Observed) -> Plan:
        service = {"apiVersion": SERVICE.api_version, "kind": "Service", "metadata": {"name": "s"}}
        return replace(plan(observed), apply=(service,))

    world = await begun(replace(WIDGET, plan=undeclared))
    await world.work()

    assert accepted(world)["reason"] == "InternalError"
    assert "v1 Service" in accepted(world)["message"]


async def test_nothing_is_written_to_an_object_on_its_way_out() -> None:
    api = MemoryApi()
    world = World((WIDGET,), Story([]), api)
    leaving = widget()
    leaving["metadata"] |= {"finalizers": ["x"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
    await world.begin()
    api.insert(world.watched()[0], leaving)
    await world.settle()

    assert api.writes == []


async def test_events_are_posted_only_with_a_status_and_a_restart_posts_none() -> None:
    world = await begun()
    await world.settle()
    posted = sorted(events(world))

    await world.restart()
    await world.settle()

    assert posted == ["Running", "Succeeded"]
    assert sorted(events(world)) == posted
    assert all("series" not in event for event in world.api.of("events"))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ApiError(404, ""), Outcome.ABSENT),
        (ApiError(409, "", reason="AlreadyExists"), Outcome.EXISTS),
        (ApiError(409, "", reason="Conflict"), Outcome.CONFLICT),
        (ApiError(410, "", reason="Expired"), Outcome.EXPIRED),
        (ApiError(422, ""), Outcome.INVALID),
        (ApiError(400, ""), Outcome.INVALID),
        (ApiError(403, "exceeded quota: x"), Outcome.WAIT),
        (ApiError(403, "", causes=("NamespaceTerminating",)), Outcome.WAIT),
        (ApiError(403, ""), Outcome.FORBIDDEN),
        (ApiError(401, ""), Outcome.RETRY),
        (ApiError(429, ""), Outcome.RETRY),
        (ApiError(500, ""), Outcome.RETRY),
        (ApiError(0, ""), Outcome.RETRY),
    ],
)
def test_the_table_of_errors(error: ApiError, outcome: Outcome) -> None:
    assert error.outcome is outcome


@pytest.mark.parametrize("body", [None, "gateway timeout", {}, {"details": None}, {"message": "m", "details": {}}])
def test_an_error_is_made_of_any_answer(body: Any) -> None:
    assert ApiError.from_body(502, body, "get Job ns/x").message.startswith("get Job ns/x: ")
