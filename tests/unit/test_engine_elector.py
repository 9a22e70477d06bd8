"""Leader election: never two leaders, takeover after expiry, at once after a release."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

from rlhf_operator.engine.elector import LEASE, Elector, Terms
from rlhf_operator.kube.errors import ApiError
from rlhf_operator.obs.metrics import Metrics
from tests.property.memory_api import MemoryApi

START = datetime(2026, 1, 1, tzinfo=UTC)
TERMS = Terms(15, 10, 2)


class Clock:
    """Each replica has its own: they differ, and so do the wall clocks."""

    def __init__(self, skew: float = 0.0) -> None:
        self.seconds = 1000.0 + skew

    def __call__(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


class Flaky(MemoryApi):
    down: bool = False

    async def get(self, *arguments):
        self._check()
        return await super().get(*arguments)

    async def replace(self, *arguments):
        self._check()
        return await super().replace(*arguments)

    def _check(self) -> None:
        if self.down:
            raise ApiError(0, "no answer")


def replica(api: MemoryApi, identity: str, clock: Clock, terms: Terms = TERMS) -> Elector:
    return Elector(
        api,
        Metrics(),
        namespace="system",
        name="rlhf-operator",
        identity=identity,
        now=clock.now,
        terms=terms,
        clock=clock,
        sleep=clock.sleep,
        rng=random.Random(0),
    )


@pytest.fixture
def api() -> Flaky:
    return Flaky()


@pytest.fixture
async def pair(api: Flaky) -> tuple[Elector, Clock, Elector, Clock]:
    """The leader and the follower, whose clocks are an hour apart."""
    ours, theirs = Clock(), Clock(skew=3600.0)
    first, second = replica(api, "first", ours), replica(api, "second", theirs)
    await first.step()
    await second.step()
    assert (first.is_leader, second.is_leader) == (True, False)
    return first, ours, second, theirs


async def test_a_renewed_lease_is_not_taken(api: Flaky, pair) -> None:
    first, ours, second, theirs = pair
    for _ in range(30):
        ours.seconds += 2
        theirs.seconds += 2
        await first.step()
        await second.step()

    assert (first.is_leader, second.is_leader) == (True, False)
    assert api.of("leases")[0]["spec"]["leaseTransitions"] == 0


async def test_a_silent_leader_is_replaced_after_the_lease_has_run_out_and_not_before(api: Flaky, pair) -> None:
    first, ours, second, theirs = pair
    theirs.seconds += 14.9
    await second.step()
    assert not second.is_leader

    theirs.seconds += 0.2
    await second.step()

    assert second.is_leader
    assert api.of("leases")[0]["spec"]["leaseTransitions"] == 1
    ours.seconds += 1
    await first.step()
    assert not first.is_leader


async def test_a_leader_that_cannot_renew_steps_down_before_anybody_can_step_up(api: Flaky, pair) -> None:
    first, ours, second, theirs = pair
    api.down = True
    ours.seconds += 9.9
    await first.step()
    assert first.is_leader
    ours.seconds += 0.2
    await first.step()
    assert not first.is_leader

    api.down = False
    theirs.seconds += 10.1
    await second.step()
    assert not second.is_leader


async def test_a_leader_that_cannot_renew_does_not_sleep_through_its_deadline(api: Flaky) -> None:
    """Its retries are as far apart as the configuration admits: the lease ran out while it slept and led on."""
    clock = Clock()
    leader = replica(api, "leader", clock, Terms(duration=15, renew_deadline=14, retry_period=9))
    led: list[float] = []

    def started() -> None:
        api.down = True
        led.append(clock.seconds)

    async def stopped() -> None:
        led.append(clock.seconds)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await leader.run(started, stopped)

    since, until = led
    assert until - since < 15


async def test_a_lease_is_not_written_shorter_than_its_holder_leads(api: Flaky) -> None:
    """It holds whole seconds: cut off, 1.9 would let another step up after 1, and 0.9 be no lease at all."""
    ours, theirs = Clock(), Clock()
    terms = Terms(duration=1.9, renew_deadline=1.8, retry_period=0.2)
    first, second = replica(api, "first", ours, terms), replica(api, "second", theirs, terms)
    await first.step()
    await second.step()

    api.down = True
    ours.seconds += 1.7
    await first.step()
    api.down = False
    theirs.seconds += 1.7
    await second.step()

    assert (first.is_leader, second.is_leader) == (True, False)


async def test_a_released_lease_is_taken_at_the_next_look(api: Flaky, pair) -> None:
    first, _, second, _ = pair

    await first.release()
    await second.step()

    assert (first.is_leader, second.is_leader) == (False, True)
    assert api.of("leases")[0]["spec"]["holderIdentity"] == "second"


async def test_a_lease_is_released_even_if_the_answer_to_its_last_renewal_is_unknown(pair) -> None:
    first, _, second, _ = pair
    first._lease = None  # as after a renewal that was cancelled on its way

    await first.release()
    await second.step()

    assert second.is_leader


async def test_a_lease_that_is_not_ours_is_not_released(api: Flaky, pair) -> None:
    first, _, second, theirs = pair
    theirs.seconds += 16
    await second.step()
    first._lease = None

    await first.release()

    assert api.of("leases")[0]["spec"]["holderIdentity"] == "second"


async def test_of_two_who_try_at_once_one_wins() -> None:
    class Racing(MemoryApi):
        """Both see that there is no lease yet."""

        async def get(self, *_):
            return None

    racing = Racing()
    first, second = replica(racing, "first", Clock()), replica(racing, "second", Clock())
    await first.step()
    await second.step()

    assert (first.is_leader, second.is_leader) == (True, False)


async def test_a_lease_deleted_by_hand_is_made_again(api: Flaky, pair) -> None:
    first, ours, _, _ = pair
    api.remove(LEASE, "system", "rlhf-operator")
    for _ in range(3):
        ours.seconds += 2
        await first.step()

    assert first.is_leader
    assert api.of("leases")[0]["spec"]["holderIdentity"] == "first"
