"""The recorder of Kubernetes Events: deduplication, series, and what it never does to the API server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from rlhf_operator.kinds.base import Event
from rlhf_operator.kube.errors import ApiError
from rlhf_operator.kube.events import BURST, QUEUED, REFILL_SECONDS, SERIES_SECONDS, Recorder
from rlhf_operator.obs.metrics import Metrics
from tests.property.memory_api import MemoryApi

NOW = datetime(2026, 1, 1, 12, 30, 1, 5, tzinfo=UTC)
STARTED = Event("Normal", "Started", "it has started")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def about(name: str = "ada") -> dict[str, Any]:
    meta = {"name": name, "namespace": "ns", "uid": f"u-{name}", "resourceVersion": "7"}
    return {"apiVersion": "rlhf.dev/v1alpha1", "kind": "Widget", "metadata": meta}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api() -> MemoryApi:
    return MemoryApi()


def recorder(api: MemoryApi, clock: Clock, metrics: Metrics | None = None) -> Recorder:
    return Recorder(api, metrics or Metrics(), instance="pod-1", clock=clock, now=lambda: NOW)


async def test_an_event_is_what_events_k8s_io_demands(api: MemoryApi, clock: Clock) -> None:
    made = recorder(api, clock)
    made.record(about(), STARTED)
    await made.drain()

    (event,) = api.of("events")
    assert event["eventTime"] == "2026-01-01T12:30:01.000005Z"
    assert (event["type"], event["reason"], event["note"]) == ("Normal", "Started", "it has started")
    assert (event["reportingController"], event["reportingInstance"]) == ("rlhf-operator", "pod-1")
    assert event["action"]
    assert event["regarding"]["uid"] == "u-ada"
    assert event["metadata"]["namespace"] == "ns"


async def test_repetitions_are_counted_and_written_rarely(api: MemoryApi, clock: Clock) -> None:
    made = recorder(api, clock)
    for _ in range(5):
        made.record(about(), STARTED)
        await made.drain()
    assert len(api.writes) == 1

    clock.now = SERIES_SECONDS
    made.record(about(), STARTED)
    await made.drain()

    (event,) = api.of("events")
    assert len(api.writes) == 2
    assert event["series"]["count"] == 6


async def test_a_restarted_operator_finds_its_own_event(api: MemoryApi, clock: Clock) -> None:
    for _ in range(2):
        made = recorder(api, clock)
        made.record(about(), STARTED)
        await made.drain()

    (event,) = api.of("events")
    assert event["series"]["count"] == 2


async def test_an_expired_event_is_posted_anew(api: MemoryApi, clock: Clock) -> None:
    made = recorder(api, clock)
    made.record(about(), STARTED)
    await made.drain()
    api.objects.clear()
    for _ in range(2):
        clock.now += SERIES_SECONDS
        made.record(about(), STARTED)
        await made.drain()

    assert len(api.of("events")) == 1


async def test_one_object_cannot_flood_and_does_not_silence_others(api: MemoryApi, clock: Clock) -> None:
    metrics = Metrics()
    made = recorder(api, clock, metrics)
    for n in range(BURST + 10):
        made.record(about("noisy"), Event("Warning", "Broken", f"number {n}"))
    made.record(about("quiet"), STARTED)
    await made.drain()

    assert len(api.of("events")) == BURST + 1
    assert metrics.events.labels("dropped")._value.get() == 10
    clock.now += REFILL_SECONDS
    made.record(about("noisy"), Event("Warning", "Broken", "later"))
    await made.drain()
    assert len(api.of("events")) == BURST + 2


async def test_the_queue_is_bounded(api: MemoryApi, clock: Clock) -> None:
    metrics = Metrics()
    made = recorder(api, clock, metrics)
    for n in range(QUEUED + 3):
        made.record(about(f"w{n}"), STARTED)

    assert made.queued == QUEUED
    assert metrics.events.labels("dropped")._value.get() == 3


async def test_an_api_server_that_refuses_events_harms_nothing(clock: Clock) -> None:
    class Refusing(MemoryApi):
        async def create(self, *_):
            raise ApiError(403, "no")

    metrics = Metrics()
    made = recorder(Refusing(), clock, metrics)
    made.record(about(), STARTED)
    await made.drain()

    assert metrics.events.labels("failed")._value.get() == 1


async def test_a_long_message_is_cut_at_a_character(api: MemoryApi, clock: Clock) -> None:
    made = recorder(api, clock)
    made.record(about(), Event("Normal", "Long", "x" + "é" * 1000))
    await made.drain()

    (event,) = api.of("events")
    assert len(event["note"].encode()) <= 1024
    assert event["note"].endswith("é")
