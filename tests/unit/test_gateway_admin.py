"""The admin and metrics ports: who may read, what is told, and what draining keeps readable."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlhf_gateway.auth import BAD_SECONDS, GOOD_SECONDS, MAX_CACHED, Guard
from rlhf_gateway.kube import ApiError
from rlhf_gateway.metrics import CATALOGUE, Metrics
from rlhf_gateway.wire import Backend
from tests.unit.gateway_world import counts_of, eventually, talks_on, world

ON_CANARY = talks_on("canary", 50.0, 3)


@pytest.mark.parametrize("path", ["/evidence", "/state"])
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Basic abc", 401),
        ("Bearer ", 401),
        ("Bearer forged", 401),
        ("Bearer other-token", 403),
        ("bearer operator-token", 200),
    ],
)
async def test_only_the_operator_reads(path: str, authorization: str | None, status: int) -> None:
    async with world() as w:
        headers = {"Authorization": authorization} if authorization else {}
        async with w.client.get(w.admin + path, headers=headers) as response:
            assert response.status == status
            assert status == 200 or "error" in await response.json()


async def test_a_token_that_cannot_be_checked_opens_nothing() -> None:
    async with world() as w:
        w.api.down = True
        async with w.client.get(w.admin + "/evidence", headers={"Authorization": "Bearer operator-token"}) as response:
            assert response.status == 503


class FakeReviewer:
    def __init__(self) -> None:
        self.answers: dict[str, str | None] = {"good": "operator"}
        self.asked: list[str] = []
        self.down = False

    async def review_token(self, token: str) -> str | None:
        self.asked.append(token)
        if self.down:
            raise ApiError(0, "down")
        return self.answers.get(token)


async def test_rulings_are_cached_for_a_while_and_bad_ones_for_less() -> None:
    now = 0.0
    reviewer = FakeReviewer()
    guard = Guard(reviewer, "operator", clock=lambda: now)
    for _ in range(3):
        assert await guard.rule("Bearer good") == "allowed"
        assert await guard.rule("Bearer bad") == "unauthenticated"
    assert reviewer.asked == ["good", "bad"]
    now = BAD_SECONDS + 0.1
    reviewer.down = True
    assert await guard.rule("Bearer good") == "allowed"
    assert await guard.rule("Bearer bad") == "unavailable"
    now = GOOD_SECONDS + 0.1
    assert await guard.rule("Bearer good") == "unavailable"
    reviewer.down = False
    reviewer.answers.clear()  # revoked meanwhile
    assert await guard.rule("Bearer good") == "unauthenticated"


async def test_the_cache_of_rulings_is_bounded() -> None:
    reviewer = FakeReviewer()
    guard = Guard(reviewer, "operator", clock=lambda: 0.0)
    for number in range(MAX_CACHED + 10):
        await guard.rule(f"Bearer guess-{number}")
    await guard.rule(f"Bearer guess-{MAX_CACHED + 9}")
    await guard.rule("Bearer guess-0")
    assert len(reviewer.asked) == MAX_CACHED + 11  # only the evicted one was asked for again


async def test_readiness_follows_the_configuration() -> None:
    async with world() as w:
        for path, status in (("/healthz", 200), ("/readyz", 503)):
            async with w.client.get(w.admin + path) as response:
                assert response.status == status
        await w.configure()
        async with w.client.get(w.admin + "/readyz") as response:
            assert response.status == 200


async def test_every_metric_of_the_catalogue_is_exported_and_no_other() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=50.0)
        await w.ask(ON_CANARY[0])
        async with w.client.get(f"http://127.0.0.1:{w.gateway.ports['metrics']}/metrics") as response:
            families = {family.name: family for family in text_string_to_metric_families(await response.text())}
        exported = {name for name in families if not name.endswith("_created")}
        assert exported == {d.name.removesuffix("_total") for d in CATALOGUE}
        for definition in CATALOGUE:
            family = families[definition.name.removesuffix("_total")]
            assert (family.type, family.documentation) == (definition.kind, definition.help)
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(definition.labels)
        (requests,) = families["rlhf_gateway_requests"].samples
        assert requests.value == 1.0
        assert requests.labels == {"rollout": "desk", "arm": "canary", "revision": "rev-canary", "stage": "1"}
        buckets = [s for s in families["rlhf_gateway_answer_duration_seconds"].samples if s.name.endswith("_bucket")]
        assert buckets[-1].labels["le"] == "+Inf"
        assert [s.value for s in buckets] == sorted(s.value for s in buckets)


def test_a_pod_that_lives_for_many_trials_does_not_export_all_of_their_stages() -> None:
    """The evidence gives up rows of stages long past; counters beside it kept every one for the life of the pod."""
    metrics, revision = Metrics("desk"), Backend(revision="rev-b", digest="sha256:" + "0" * 64, url="http://b")
    for stage in range(300):
        metrics.event("abandoned", "stable", revision, 99)  # goes on all the time
        metrics.event("abandoned", "canary", revision, 100 * stage)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    rows = {sample.labels["stage"]: sample.value for sample in samples if sample.name.endswith("_total")}
    assert len(rows) == 64
    assert (rows["99"], rows["29900"]) == (300.0, 1.0)


async def test_draining_finishes_answers_and_waits_until_the_last_counts_were_pulled() -> None:
    async with world(drain_accept_seconds=0.2) as w:
        await w.configure()
        w.stable.hold = asyncio.Event()
        asking = asyncio.create_task(w.ask("c"))
        await eventually(lambda: w.stable.calls)
        stop = asyncio.Event()
        running = asyncio.create_task(w.gateway.run_until(stop))
        stop.set()
        await eventually(lambda: w.gateway.state.draining)
        async with w.client.get(w.admin + "/readyz") as response:
            assert (response.status, await response.text()) == (503, "not ready: draining\n")
        async with w.client.get(f"{w.url}/v1/models") as response:  # endpoints are withdrawn with a delay
            assert (response.status, response.headers["Connection"]) == (200, "close")
        w.stable.hold.set()
        assert (await asking).status == 200
        done, _ = await asyncio.wait([running], timeout=0.4)
        assert not done  # nobody has the last counts yet
        assert counts_of(await w.pull(), "stable").requests == 1
        await running


async def test_draining_gives_up_on_a_reader_that_never_comes() -> None:
    async with world(drain_evidence_seconds=0.1) as w:
        await asyncio.wait_for(w.gateway.drain(), 2)
