"""The work queue: deduplication, exclusiveness, deadlines, backoff."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_operator.engine.queue import Backoff, WorkQueue
from rlhf_operator.kinds.base import Key
from rlhf_operator.obs.metrics import Metrics

A, B = Key("Widget", "ns", "a"), Key("Widget", "ns", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue(Metrics(), clock=clock, rng=random.Random(1), backoff=Backoff(base=1.0, cap=60.0))


def test_a_key_waiting_twice_is_one_key(queue: WorkQueue) -> None:
    for key in (A, B, A):
        queue.add(key)

    assert [queue.try_get(), queue.try_get(), queue.try_get()] == [A, B, None]


def test_a_key_is_never_worked_on_twice_at_once_but_once_more_afterwards(queue: WorkQueue) -> None:
    queue.add(A)
    assert queue.try_get() == A
    queue.add(A)
    queue.add(A)
    assert queue.try_get() is None

    queue.done(A)

    assert [queue.try_get(), queue.try_get()] == [A, None]


def test_a_delayed_add_keeps_the_earliest_deadline(queue: WorkQueue, clock: Clock) -> None:
    queue.add_after(A, 10)
    queue.add_after(A, 5)
    queue.add_after(A, 20)
    assert queue.next_deadline() == 5

    clock.now = 4.9
    assert queue.try_get() is None
    clock.now = 5
    assert queue.try_get() == A
    queue.done(A)
    clock.now = 30
    assert queue.try_get() is None


def test_a_far_deadline_that_moves_at_every_pass_leaves_nothing_behind(queue: WorkQueue, clock: Clock) -> None:
    """A job that reports every 10 s, with a deadline a day away."""
    for _ in range(2000):
        clock.now += 10
        queue.add(A)
        assert queue.try_get() == A
        queue.done(A)
        queue.add_after(A, 86_400)
    queue.add_after(B, 90_000)
    assert len(queue._heap) < 100
    clock.now += 86_400
    assert [queue.try_get(), queue.try_get()] == [A, None]
    clock.now += 3_600
    assert [queue.try_get(), queue.try_get()] == [B, None]


def test_an_immediate_add_replaces_a_delayed_one(queue: WorkQueue, clock: Clock) -> None:
    queue.add_after(A, 10)
    queue.add(A)
    assert queue.try_get() == A
    queue.done(A)

    clock.now = 11

    assert queue.try_get() is None


def test_backoff_doubles_with_jitter_up_to_its_cap_and_starts_anew_after_forget(queue: WorkQueue) -> None:
    delays = [queue.retry(A) for _ in range(9)]

    for strike, delay in enumerate(delays):
        full = min(60.0, 2.0**strike)
        assert full / 2 <= delay <= full
    queue.forget(A)
    assert queue.retry(A) <= 1.0
    assert queue.retry(B, at_least=7.0) == 7.0


def test_closing_ends_all_who_wait_and_hands_out_nothing_more(queue: WorkQueue) -> None:
    async def run() -> list[Key | None]:
        waiters = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(0)
        queue.close()
        queue.add(A)
        return await asyncio.gather(*waiters)

    assert asyncio.run(run()) == [None, None, None]


async def test_waiting_workers_share_what_comes() -> None:
    queue = WorkQueue(Metrics())
    waiters = [asyncio.create_task(queue.get()) for _ in range(2)]
    await asyncio.sleep(0)

    queue.add(A)
    queue.add_after(B, 0.01)

    async with asyncio.timeout(5):
        assert set(await asyncio.gather(*waiters)) == {A, B}


ROLLOUT = Key("PolicyRollout", "ns", "desk")


def take(queue: WorkQueue) -> Key | None:
    key = queue.try_get()
    if key is not None:
        queue.done(key)
    return key


def test_who_serves_users_goes_first_then_who_is_new(clock: Clock) -> None:
    queue = WorkQueue(Metrics(), clock=clock, urgent={"PolicyRollout"})
    queue.add(A)
    assert take(queue) == A
    for key in (A, B, ROLLOUT):
        queue.add(key)

    assert [take(queue) for _ in range(4)] == [ROLLOUT, B, A, None]


def test_an_object_that_comes_again_under_its_name_is_new(queue: WorkQueue) -> None:
    for key in (A, B):
        queue.add(key)
        assert take(queue) == key
    queue.gone(B)
    queue.add(A)
    queue.add(B)

    assert [take(queue), take(queue)] == [B, A]


def test_nobody_waits_for_ever_behind_who_goes_first(clock: Clock) -> None:
    """Urgent keys come as fast as they are taken; one of the others is still taken every fourth turn."""
    queue = WorkQueue(Metrics(), clock=clock, urgent={"PolicyRollout"})
    waiting = [Key("Widget", "ns", str(number)) for number in range(3)]
    for key in waiting:
        queue.add(key)
    taken = []
    for _ in range(4 * len(waiting)):
        clock.now += 1
        queue.add(ROLLOUT)
        taken.append(take(queue))

    assert [key for key in taken if key != ROLLOUT] == waiting
    assert taken.count(ROLLOUT) == 3 * len(waiting)


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "after", "get", "done", "tick"]), st.sampled_from([A, B]), st.integers(0, 5))
)


@given(STEPS)
def test_no_add_is_lost_and_no_key_is_ever_in_two_workers(steps) -> None:
    clock = Clock()
    queue = WorkQueue(Metrics(), clock=clock)
    working: set[Key] = set()
    owed: dict[Key, float] = {}  # key -> by when it must be handed out

    for what, key, number in steps:
        match what:
            case "add":
                queue.add(key)
                owed[key] = clock.now
            case "after":
                queue.add_after(key, float(number))
                owed[key] = min(owed.get(key, float("inf")), clock.now + number)
            case "tick":
                clock.now += number
            case "done" if key in working:
                working.discard(key)
                queue.done(key)
            case "get":
                got = queue.try_get()
                if got is None:
                    assert not [k for k, due in owed.items() if due <= clock.now and k not in working]
                else:
                    assert got not in working
                    assert owed.pop(got) <= clock.now
                    working.add(got)
