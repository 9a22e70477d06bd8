"""Every metric of the operator, defined once.

The names are controller-runtime's where the meaning is the same, under the prefix `rlhf_operator_`: dashboards for
Go controllers carry over by changing the prefix. No label ever holds an object's name, so the number of series does
not grow with the number of objects. Facts about single objects come from `ObjectCollector`, a pure function of the
store behind a switch: they survive a restart and vanish with the object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from rlhf_operator.kinds.base import Object

PREFIX = "rlhf_operator_"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue; `name` is without the prefix, and without `_total` for counters."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


CATALOGUE = (
    Metric("reconcile", "counter", "Passes, by how they ended.", ("kind", "result")),
    Metric("reconcile_errors", "counter", "Passes that will be retried after an error.", ("kind",)),
    Metric("reconcile_panics", "counter", "Plans that raised: each one is a defect of this operator.", ("kind",)),
    Metric("terminal_reconcile_errors", "counter", "Passes that wait for the user to change the object.", ("kind",)),
    Metric("reconcile_time_seconds", "histogram", "Length of a pass.", ("kind",)),
    Metric("active_workers", "gauge", "Workers in a pass now."),
    Metric("max_concurrent_reconciles", "gauge", "Workers there are."),
    Metric("workqueue_depth", "gauge", "Keys ready to be worked on."),
    Metric("workqueue_delayed", "gauge", "Keys waiting for a deadline or a backoff."),
    Metric("workqueue_adds", "counter", "Keys put on the queue."),
    Metric("workqueue_retries", "counter", "Keys put back with a backoff."),
    Metric("workqueue_queue_duration_seconds", "histogram", "How long a key was ready before a worker took it."),
    Metric("workqueue_work_duration_seconds", "histogram", "How long a worker held a key."),
    Metric("workqueue_unfinished_work_seconds", "gauge", "Age of all passes under way, added up."),
    Metric("workqueue_longest_running_processor_seconds", "gauge", "Age of the oldest pass under way."),
    Metric("rest_client_requests", "counter", "Requests to the API server; code 0: none came back.",
           ("verb", "resource", "code")),
    Metric("rest_client_request_duration_seconds", "histogram", "Length of a request.", ("verb", "resource")),
    Metric("leader_election_master_status", "gauge", "1 while this replica holds the Lease."),
    Metric("watch_age_seconds", "gauge", "Time since a watch or its listing was last answered.", ("resource",)),
    Metric("watch_events", "counter", "Watch events; changed: no if they held nothing that is read.",
           ("resource", "changed")),
    Metric("store_objects", "gauge", "Objects held in memory.", ("kind",)),
    Metric("store_ghosts", "counter", "Objects whose deletion no watch reported, found by listing again.", ("kind",)),
    Metric("events", "counter", "Kubernetes Events: posted, series, folded, dropped, failed.", ("result",)),
    Metric("events_queued", "gauge", "Kubernetes Events waiting to be written."),
    Metric("pulls", "counter", "HTTP pulls from pods: ok, error.", ("result",)),
    Metric("pull_seconds", "histogram", "Length of a pull."),
    Metric("event_loop_lag_seconds", "gauge", "How late the event loop woke a timer, at the last look."),
    Metric("decisions_honoured", "gauge", "1 while the policy that binds Decisions to their author is in place."),
    Metric("build_info", "gauge", "Always 1.", ("version",)),
)  # fmt: skip

OBJECT_METRICS = (
    Metric("rlhf_resource_phase", "gauge", "1 for the object's phase.", ("kind", "namespace", "name", "phase")),
    Metric("rlhf_resource_condition", "gauge", "1 for the status that each condition has.",
           ("kind", "namespace", "name", "type", "status", "reason")),
    Metric("rlhf_resource_created_timestamp_seconds", "gauge", "When the object was created.",
           ("kind", "namespace", "name")),
)  # fmt: skip


class Metrics:
    """The catalogue as live metrics in a registry of its own: tests make as many as they like."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` doubles the number of samples and says nothing
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        made: dict[str, Any] = {metric.name: self._make(metric) for metric in CATALOGUE}
        self.reconcile: Counter = made["reconcile"]
        self.reconcile_errors: Counter = made["reconcile_errors"]
        self.reconcile_panics: Counter = made["reconcile_panics"]
        self.terminal_reconcile_errors: Counter = made["terminal_reconcile_errors"]
        self.reconcile_time: Histogram = made["reconcile_time_seconds"]
        self.active_workers: Gauge = made["active_workers"]
        self.max_concurrent_reconciles: Gauge = made["max_concurrent_reconciles"]
        self.queue_depth: Gauge = made["workqueue_depth"]
        self.queue_delayed: Gauge = made["workqueue_delayed"]
        self.queue_adds: Counter = made["workqueue_adds"]
        self.queue_retries: Counter = made["workqueue_retries"]
        self.queue_wait: Histogram = made["workqueue_queue_duration_seconds"]
        self.work_duration: Histogram = made["workqueue_work_duration_seconds"]
        self.unfinished_work: Gauge = made["workqueue_unfinished_work_seconds"]
        self.longest_running: Gauge = made["workqueue_longest_running_processor_seconds"]
        self.leader: Gauge = made["leader_election_master_status"]
        self.watch_age: Gauge = made["watch_age_seconds"]
        self.watch_events: Counter = made["watch_events"]
        self.store_objects: Gauge = made["store_objects"]
        self.store_ghosts: Counter = made["store_ghosts"]
        self.events: Counter = made["events"]
        self.events_queued: Gauge = made["events_queued"]
        self.pulls: Counter = made["pulls"]
        self.pull_seconds: Histogram = made["pull_seconds"]
        self.loop_lag: Gauge = made["event_loop_lag_seconds"]
        self.decisions_honoured: Gauge = made["decisions_honoured"]
        self.build_info: Gauge = made["build_info"]
        self._requests: Counter = made["rest_client_requests"]
        self._request_seconds: Histogram = made["rest_client_request_duration_seconds"]

    def api_request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        self._requests.labels(verb, resource, str(code)).inc()
        self._request_seconds.labels(verb, resource).observe(seconds)

    def precreate(self, kinds: Iterable[str], watched: Iterable[str]) -> None:
        """A counter that first appears at 1 has no increase: the first defect would be invisible."""
        for kind in kinds:
            for metric in (self.reconcile_errors, self.reconcile_panics, self.terminal_reconcile_errors):
                metric.labels(kind)
        for kind in watched:
            self.store_ghosts.labels(kind)
        for result in ("posted", "series", "folded", "dropped", "failed"):
            self.events.labels(result)
        for result in ("ok", "error"):
            self.pulls.labels(result)

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        name = PREFIX + metric.name
        match metric.type:
            case "counter":
                return Counter(name, metric.help, metric.labels, registry=self.registry)
            case "gauge":
                return Gauge(name, metric.help, metric.labels, registry=self.registry)
            case "histogram":
                return Histogram(name, metric.help, metric.labels, buckets=_FAST, registry=self.registry)


class ObjectCollector(Collector):
    """Facts about single objects, read from the store at the moment of the scrape."""

    def __init__(self, primaries: Callable[[], Iterable[Object]]) -> None:
        self._primaries = primaries

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The families without samples: a registry that is asked for some names need not collect the others."""
        yield from _families().values()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families = _families()
        for primary in self._primaries():
            for name, labels, value in object_facts(primary):
                families[name].add_metric(labels, value)
        yield from families.values()


def _families() -> dict[str, GaugeMetricFamily]:
    return {m.name: GaugeMetricFamily(m.name, m.help, labels=m.labels) for m in OBJECT_METRICS}


def object_facts(primary: Object) -> Iterator[tuple[str, list[str], float]]:
    """(metric, label values, value) of one object."""
    meta: Mapping[str, Any] = primary["metadata"]
    identity = [primary["kind"], meta.get("namespace", ""), meta["name"]]
    status: Mapping[str, Any] = primary.get("status") or {}
    if status.get("phase"):
        yield "rlhf_resource_phase", [*identity, status["phase"]], 1.0
    for condition in status.get("conditions") or ():
        labels = [condition["type"], condition["status"], condition.get("reason", "")]
        yield "rlhf_resource_condition", identity + labels, 1.0
    if meta.get("creationTimestamp"):
        created = datetime.fromisoformat(meta["creationTimestamp"])
        yield "rlhf_resource_created_timestamp_seconds", identity, created.timestamp()
