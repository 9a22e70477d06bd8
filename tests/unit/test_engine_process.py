"""Configuration, logs, probes, metrics: what surrounds the engine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_operator.__main__ import main
from rlhf_operator.api.decision import POLICY_NAME, admission_policy, admission_policy_binding
from rlhf_operator.config import Config, ConfigError, load
from rlhf_operator.engine.gate import BINDING, POLICY, DecisionGate
from rlhf_operator.engine.relister import Relister
from rlhf_operator.engine.sources import gate_sources, sources
from rlhf_operator.engine.store import Store
from rlhf_operator.kinds.base import POD, Resource
from rlhf_operator.kube.api import path_of, proxy_of
from rlhf_operator.obs import health
from rlhf_operator.obs.logging import JsonFormatter, TextFormatter, bound
from rlhf_operator.obs.metrics import CATALOGUE, Metrics, ObjectCollector
from rlhf_operator.watch import handlers
from rlhf_operator.watch.handlers import WatchClock, watched_paths
from tests.property.memory_api import MemoryApi
from tests.property.toy import WIDGET

WS = Resource("rlhf.dev", "v1alpha1", "W", "ws")
MINIMAL = "trainerImage: t:1\ngatewayImage: g:1\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_a_minimal_configuration_has_the_documented_defaults(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "prices: {perHour: {nvidia.com/gpu: 2.5}}\n")

    config = load(config_file, namespaces=None)

    assert config.namespaces == ()
    assert config.settings().trainer_image == "t:1"
    assert config.settings().prices.per_hour == {"nvidia.com/gpu": 2.5}
    election = config.leader_election
    assert (election.lease_duration_seconds, election.renew_deadline_seconds, election.retry_period_seconds) == (
        15,
        10,
        2,
    )


def test_flags_win_over_the_file(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "namespaces: [a]\n")

    assert load(config_file, namespaces=("b", "c")).namespaces == ("b", "c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold a mapping"),
        ("- a\n", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("trainerImage: t\n", "gatewayImage: Field required"),
        (MINIMAL + "worker: 3\n", "worker: Extra inputs"),
        (MINIMAL + "workers: 0\n", "workers: Input should be greater"),
        (MINIMAL + "leaderElection: {renewDeadlineSeconds: 20}\n", "must hold"),
        (MINIMAL + "prices: {perHour: {cpu: -1}}\n", "prices.perHour.cpu"),
        (MINIMAL + "log: {level: loud}\n", "log.level"),
    ],
)
def test_a_bad_configuration_says_where_and_what(config_file: Path, text: str, words: str) -> None:
    config_file.write_text(text)

    with pytest.raises(ConfigError, match=words):
        load(config_file)


def test_the_command_ends_with_2_and_a_message_on_a_bad_configuration(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file)]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err


def test_the_configuration_is_frozen(config_file: Path) -> None:
    config_file.write_text(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        load(config_file).workers = 3  # type: ignore[misc]
    assert Config.model_fields["workers"].default == 8


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("a.b", logging.ERROR, __file__, 1, message, None, info)


def raised(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_a_log_line_is_json_and_carries_the_object_and_the_pass() -> None:
    formatter = JsonFormatter()
    with bound(kind="Widget", name="ada"), bound(reconcile="r1"):
        line = json.loads(formatter.format(record("hello")))
    after = json.loads(formatter.format(record("bye")))

    assert (line["kind"], line["name"], line["reconcile"], line["message"]) == ("Widget", "ada", "r1", "hello")
    assert "kind" not in after


def test_one_stack_trace_per_distinct_error() -> None:
    formatter = JsonFormatter()
    lines = [json.loads(formatter.format(record("failed", raised(f"no {n}")))) for n in range(3)]
    other = json.loads(formatter.format(record("failed", KeyError("x"))))

    assert ["trace" in line for line in lines] == [True, False, False]
    assert [line.get("seen") for line in lines] == [None, 2, 3]
    assert lines[2]["error"] == "ValueError: no 2"
    assert "trace" in other


@given(st.text(max_size=50))
def test_every_log_line_is_one_line(message: str) -> None:
    line = JsonFormatter().format(record(message.replace("%", "")))

    assert json.loads(line)["message"] == message.replace("%", "")
    assert "\n" not in line


def test_text_logs_show_the_trace_below() -> None:
    text = TextFormatter().format(record("failed", raised("x")))

    assert text.splitlines()[0].endswith("error=ValueError: x")
    assert "Traceback" in text


async def served(**checks: list[health.Problem]) -> tuple[health.Server, str]:
    server = health.Server(
        Metrics(),
        live=(lambda: checks.get("live", []),),
        ready=(lambda: checks.get("ready", []),),
        measure=lambda: None,
    )
    await server.start("127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.port}"


async def test_probes_say_what_is_wrong() -> None:
    server, url = await served(ready=[health.Problem("store", "the first listing is not complete")])
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{url}/livez") as live:
            assert live.status == 200
        async with http.get(f"{url}/readyz") as ready:
            assert (ready.status, await ready.text()) == (503, "store: the first listing is not complete\n")
        async with http.get(f"{url}/metrics") as metrics:
            assert "rlhf_operator_build_info" in await metrics.text()
    await server.stop()


def test_an_old_watch_and_a_stuck_pass_are_problems() -> None:
    ages = {"jobs": 10.0, "pods": 500.0}

    (old,) = health.watches_fresh(lambda: ages)()
    (stuck,) = health.no_stuck_pass(lambda: 301.0)()

    assert "pods" in old.message
    assert "301 s" in stuck.message
    assert not list(health.no_stuck_pass(lambda: 1.0)())


def test_the_watch_clock_knows_the_oldest_of_several_namespaces() -> None:
    now = [0.0]
    clock = WatchClock(watched_paths(sources((WIDGET,)), ["a", "b"]), clock=lambda: now[0])
    now[0] = 100.0
    clock.answered("/apis/rlhf.dev/v1alpha1/namespaces/a/widgets")
    clock.answered("/apis/something/else")

    assert clock.ages()["widgets"] == 100.0
    clock.answered("/apis/rlhf.dev/v1alpha1/namespaces/b/widgets")
    assert clock.ages()["widgets"] == 0.0
    assert clock.ages()["jobs"] == 100.0


def test_children_are_watched_by_label_and_the_policy_by_name() -> None:
    selectors = {source.resource.kind: source.labels for source in sources((WIDGET,))}

    assert selectors == {
        "Widget": "",
        "Decision": "",
        "Job": "rlhf.dev/managed-by=rlhf-operator",
        "ConfigMap": "rlhf.dev/managed-by=rlhf-operator",
    }
    assert {source.fields for source in gate_sources()} == {"metadata.name=decisions.rlhf.dev"}


@pytest.mark.parametrize(
    ("resource", "arguments", "path"),
    [
        (POD, ("ns", "p"), "/api/v1/namespaces/ns/pods/p"),
        (POD, (None,), "/api/v1/pods"),
        (
            Resource("rlhf.dev", "v1alpha1", "W", "ws"),
            ("ns", "w", "status"),
            "/apis/rlhf.dev/v1alpha1/namespaces/ns/ws/w/status",
        ),
    ],
)
def test_paths(resource: Resource, arguments: tuple[Any, ...], path: str) -> None:
    assert path_of(resource, *arguments) == path


def test_no_metric_of_the_catalogue_has_labels_that_grow_with_objects() -> None:
    assert not [metric.name for metric in CATALOGUE if {"name", "namespace", "uid"} & set(metric.labels)]


def test_rare_counters_are_there_before_they_count() -> None:
    metrics = Metrics()
    metrics.precreate(["Widget"], ["Widget", "Job"])

    for name, labels in (
        ("reconcile_panics_total", {"kind": "Widget"}),
        ("store_ghosts_total", {"kind": "Job"}),
        ("events_total", {"result": "dropped"}),
    ):
        assert metrics.registry.get_sample_value(f"rlhf_operator_{name}", labels) == 0


def test_kopf_keeps_nothing_and_posts_nothing() -> None:
    made = handlers.settings((*sources((WIDGET,)), *gate_sources()))
    body = {"metadata": {"annotations": {"a": "b"}}, "spec": {"x": 1}}

    assert made.persistence.diffbase_storage.build(body=body) == {}
    assert made.persistence.diffbase_storage.fetch(body=body) is None
    assert made.persistence.progress_storage.fetch(key="k", body=body) is None
    assert not made.posting.enabled
    assert made.peering.standalone


async def test_the_gate_closes_when_a_lost_deletion_is_found_by_listing_again() -> None:
    api, metrics, woken = MemoryApi(), Metrics(), []
    for resource, obj in ((POLICY, admission_policy()), (BINDING, admission_policy_binding())):
        api.insert(resource, {**obj, "metadata": {**obj["metadata"], "namespace": ""}})
    store, gate = Store((WIDGET,)), DecisionGate(metrics)
    store.put({"kind": "Widget", "metadata": {"name": "ada", "namespace": "ns", "uid": "u"}})
    relister = Relister((), (), store, gate, api, metrics, woken.extend)
    assert not gate.open
    await relister.prime()
    assert gate.open

    api.remove(BINDING, "", POLICY_NAME)
    await relister.once()

    assert not gate.open
    assert woken == [("Widget", "ns", "ada")]


def test_facts_about_objects_are_a_function_of_the_store() -> None:
    objects: list[dict[str, Any]] = [
        {
            "kind": "Widget",
            "metadata": {"name": "ada", "namespace": "ns", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"phase": "Running", "conditions": [{"type": "Accepted", "status": "True", "reason": "Ok"}]},
        }
    ]
    metrics = Metrics()
    metrics.registry.register(ObjectCollector(lambda: objects))
    identity = {"kind": "Widget", "namespace": "ns", "name": "ada"}

    assert metrics.registry.get_sample_value("rlhf_resource_phase", {**identity, "phase": "Running"}) == 1
    condition = {**identity, "type": "Accepted", "status": "True", "reason": "Ok"}
    assert metrics.registry.get_sample_value("rlhf_resource_condition", condition) == 1
    objects.clear()
    assert metrics.registry.get_sample_value("rlhf_resource_phase", {**identity, "phase": "Running"}) is None


async def test_a_scrape_that_names_metrics_collects_no_others() -> None:
    looked: list[int] = []

    def primaries() -> list[Any]:
        looked.append(1)
        return [{"kind": "Widget", "metadata": {"namespace": "ns", "name": "ada"}, "status": {"phase": "Running"}}]

    metrics = Metrics()
    metrics.registry.register(ObjectCollector(primaries))
    metrics.decisions_honoured.set(1)
    server = health.Server(metrics, live=(), ready=(), measure=lambda: None)
    await server.start("127.0.0.1", 0)
    try:
        one = await _scraped(server.port, "rlhf_operator_decisions_honoured")
        assert [line for line in one.splitlines() if line[0] != "#"] == ["rlhf_operator_decisions_honoured 1.0"]
        assert not looked
        assert 'name="ada"' in await _scraped(server.port, "rlhf_resource_phase")
        whole = await _scraped(server.port)
        assert "rlhf_operator_decisions_honoured 1.0" in whole
        assert 'name="ada"' in whole
    finally:
        await server.stop()


async def _scraped(port: int, *names: str) -> str:
    url = f"http://127.0.0.1:{port}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url, params=[("name[]", name) for name in names]) as answer:
        return await answer.text()


@pytest.mark.parametrize(
    ("server", "environment", "expected"),
    [
        ("https://10.0.0.1:443", {}, None),
        ("https://10.0.0.1:443", {"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ("https://10.0.0.1:443", {"HTTP_PROXY": "http://proxy:3128"}, None),
        ("https://10.0.0.1:443", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "10.0.0.1"}, None),
        ("https://10.0.0.1:443", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".svc,10.0.0.1:443"}, None),
        ("http://api.example", {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "example.org"}, "http://proxy:3128"),
    ],
)
def test_the_proxy_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, server: str, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert proxy_of(server) == expected


def test_the_folder_operator_does_not_hide_the_standard_library() -> None:
    root = Path(__file__).parents[2]
    code = "import operator; assert operator.itemgetter; print(operator.__file__)"

    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)

    assert str(root) not in done.stdout
