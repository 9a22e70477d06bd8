"""Whatever the order of events and whatever gets lost, the engine reaches the state that the story asks for, creates
nothing twice, and then writes nothing."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_operator.api.labels import API_VERSION
from rlhf_operator.kinds.base import KindSpec, Observed, Plan
from tests.property.memory_api import Dict, Faults, MemoryApi
from tests.property.toy import WIDGET, plan
from tests.property.world import NAMESPACE, Story, World

NAMES = ("ada", "bob", "cyd")
WIDGETS = (WIDGET,)


def widget(name: str, color: str = "red", after: str | None = None) -> Dict:
    spec: Dict = {"color": color}
    if after:
        spec["after"] = after
    meta = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": API_VERSION, "kind": "Widget", "metadata": meta, "spec": spec}


def recolor(name: str, color: str):
    def edit(api: MemoryApi) -> None:
        for obj in api.of("widgets"):
            if obj["metadata"]["name"] == name:
                api.store(api.resources["widgets"], {**obj, "spec": {**obj["spec"], "color": color}})

    return edit


def delete(name: str):
    def edit(api: MemoryApi) -> None:
        if any(o["metadata"]["name"] == name for o in api.of("widgets")):
            api.remove(api.resources["widgets"], NAMESPACE, name)

    return edit


@st.composite
def stories(draw) -> Story:
    manifests = []
    for index, name in enumerate(NAMES[: draw(st.integers(1, 3))]):
        after = draw(st.sampled_from([None, *NAMES[:index]]))
        manifests.append(widget(name, draw(st.sampled_from(["red", "blue"])), after))
    failing = {f"{m['metadata']['name']}-a{n}" for m in manifests for n in (1, 2, 3) if draw(st.booleans())}
    edits = [recolor(draw(st.sampled_from(NAMES)), "green") for _ in range(draw(st.integers(0, 2)))]
    return Story(manifests, frozenset(failing), edits)


LUCK = st.lists(
    st.one_of(
        st.tuples(st.just("work"), st.just(1)),
        st.tuples(st.just("deliver"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["kubelet", "user", "lose", "crash", "relist"]), st.just(1)),
        st.tuples(st.just("drop"), st.integers(1, 3)),
        st.tuples(st.just("conflict"), st.integers(1, 2)),
        st.tuples(st.just("lost-answer"), st.integers(1, 2)),
        st.tuples(st.just("crash-in"), st.integers(1, 3)),
        st.tuples(st.just("wait"), st.sampled_from([0.05, 1.0, 30.0])),
    ),
    max_size=60,
)


async def play(world: World, luck: list[tuple[str, float]]) -> None:
    for what, amount in luck:
        match what:
            case "work":
                await world.work()
            case "deliver":
                world.deliver(int(amount))
            case "kubelet":
                world.kubelet()
            case "user":
                world.user()
            case "lose":
                world.lose_events()
            case "drop":
                world.drop_events(int(amount))
            case "crash":
                await world.restart()
            case "relist":
                await world.relist()
            case "conflict":
                world.api.faults.conflicts = int(amount)
            case "lost-answer":
                world.api.faults.lost_answers = int(amount)
            case "crash-in":
                world.api.faults.crash_after = len(world.api.writes) + int(amount)
            case "wait":
                world.clock.seconds += amount
    world.api.faults = Faults()


async def undisturbed(kinds: tuple[KindSpec, ...], story: Story) -> World:
    world = World(kinds, story)
    await world.begin()
    await world.settle()
    return world


async def check(world: World, reference: World) -> None:
    await world.settle_after_faults()
    assert world.state() == reference.state()
    twice = {name: count for name, count in world.creations().items() if count > 1}
    assert twice == {}
    assert await world.writes_at_rest() == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(story=stories(), luck=LUCK)
async def test_any_interleaving_with_any_faults_ends_in_the_same_state(story: Story, luck) -> None:
    reference = await undisturbed(WIDGETS, story)
    world = World(WIDGETS, story)
    await world.begin()

    await play(world, luck)

    await check(world, reference)


STORY = Story(
    [widget("ada"), widget("bob", after="ada"), widget("cyd")],
    frozenset({"ada-a1", "cyd-a1", "cyd-a2", "cyd-a3"}),
    [recolor("ada", "green")],
)


async def test_the_story_itself_exercises_every_kind_of_write() -> None:
    world = await undisturbed(WIDGETS, STORY)

    phases = {o["metadata"]["name"]: o["status"]["phase"] for o in world.api.of("widgets")}
    assert phases == {"ada": "Succeeded", "bob": "Succeeded", "cyd": "Failed"}
    assert {write.verb for write in world.api.writes} >= {"create", "apply", "patch-status", "delete"}
    assert all(write.changed for write in world.api.writes)


async def test_a_crash_after_every_single_write_changes_nothing() -> None:
    reference = await undisturbed(WIDGETS, STORY)

    for k in range(1, len(reference.api.writes) + 1):
        world = World(WIDGETS, STORY, MemoryApi(Faults(crash_after=k)))
        await world.begin()
        await world.settle()
        assert world.lives == 2, f"no crash after write {k}"
        await check(world, reference)


async def test_two_crashes_and_a_lost_answer_anywhere_change_nothing() -> None:
    reference = await undisturbed(WIDGETS, STORY)

    for k in range(1, len(reference.api.writes)):
        world = World(WIDGETS, STORY, MemoryApi(Faults(crash_after=k, lost_answers=1)))
        await world.begin()
        await world.settle()
        world.api.faults.crash_after = len(world.api.writes) + 1
        await check(world, reference)


async def test_children_of_a_deleted_namesake_are_not_taken_over() -> None:
    world = World(WIDGETS, Story([widget("ada")]))
    await world.begin()
    await world.work()
    old = world.api.of("jobs")[0]["metadata"]["uid"]
    world.api.remove(world.api.resources["widgets"], NAMESPACE, "ada")
    world.api.insert(world.api.resources["widgets"], widget("ada", "blue"))
    world.deliver()
    await world.work()
    waiting = world.api.of("widgets")[0]["status"]["conditions"][0]

    await world.settle_after_faults()

    assert (waiting["status"], waiting["reason"]) == ("Unknown", "WaitingForDeletion")
    assert [job["metadata"]["uid"] for job in world.api.of("jobs")] != [old]
    assert world.api.of("widgets")[0]["status"]["phase"] == "Succeeded"


# Negative controls: the suite must catch plans that are not what a plan must be.


def restless(observed: Observed) -> Plan:
    made = plan(observed)
    attempt = (observed.primary.get("status") or {}).get("attempt", 0) + 1
    return replace(made, status={**made.status, "attempt": attempt})


def random_names(observed: Observed) -> Plan:
    made = plan(observed)
    if observed.children["Job"]:
        return replace(made, create=())
    renamed = [{**c, "metadata": {**c["metadata"], "name": f"job-{uuid.uuid4().hex[:6]}"}} for c in made.create]
    return replace(made, create=tuple(renamed))


def forgetful(observed: Observed) -> Plan:
    """Deletes before the outcome is written down."""
    return replace(plan(observed), status_first=False)


async def test_a_restless_plan_is_caught() -> None:
    kinds = (replace(WIDGET, plan=restless),)

    with pytest.raises(AssertionError, match="no rest"):
        await undisturbed(kinds, STORY)


@pytest.mark.parametrize("bad", [random_names, forgetful])
async def test_a_plan_that_is_not_crash_safe_is_caught(bad) -> None:
    kinds = (replace(WIDGET, plan=bad),)
    reference = await undisturbed(WIDGETS, STORY)

    async def with_crashes() -> None:
        for k in range(1, len(reference.api.writes) + 1):
            world = World(kinds, STORY, MemoryApi(Faults(crash_after=k)))
            await world.begin()
            await check(world, reference)

    with pytest.raises(AssertionError):
        await with_crashes()
