"""Every metric of the gateway, in one catalogue. Labels name the rollout, arm, revision and stage, never a user.

What the evidence counts is not counted a second time: `EvidenceCollector` renders the ledger itself. Only what is
outside the evidence (retries, dropped shadows, …) has counters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rlhf_gateway.evidence import Ledger, RowKey
from rlhf_gateway.wire import ArmCounts, Backend, DataPlaneState


@dataclass(frozen=True)
class Definition:
    """One metric, as documented and as exported."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("rollout",)


ROW = ("rollout", "arm", "revision", "stage")
_ROW_COUNTERS = {
    "requests": "Requests answered or failed by an arm (arm=shadow: mirrored, never shown to a user).",
    "failures": "Requests an arm gave no answer to: connection error, 5xx or timeout.",
    "diverted": "Requests of an arm that stable served because the arm was ejected.",
    "judged": "Answers the safety filter judged.",
    "violations": "Answers the safety filter tripped on.",
    "harmful_served": "Tripped answers that reached a user.",
    "conversations": "Conversations seen, each counted once.",
    "failed_conversations": "Conversations with at least one failure.",
    "judged_conversations": "Conversations with at least one judged answer.",
    "violating_conversations": "Conversations with at least one violation.",
}
_EVENTS = {
    "reanswers": "Answers stable gave in place of canary (safety hit, failure, ejection or severed).",
    "reanswer_failures": "Such answers that stable failed to give: the user got an error.",
    "severed": "Answers cut by a rollback in mode sever.",
    "abandoned": "Requests whose client went away before the answer was whole.",
    "shadow_dropped": "Mirrored requests left out because too many were in flight.",
}
LATENCY = Definition(
    "rlhf_gateway_answer_duration_seconds", "histogram", "Time to a whole answer of an arm, seconds.", ROW
)
GAUGES = (
    Definition("rlhf_gateway_config_generation", "gauge", "Generation of the configuration in force; -1 before any."),
    Definition("rlhf_gateway_canary_weight_percent", "gauge", "Canary weight in force on this pod, percent."),
    Definition("rlhf_gateway_in_flight", "gauge", "Answers in flight.", ("rollout", "revision")),
    Definition("rlhf_gateway_ejected", "gauge", "1 while this pod sees no live endpoint.", ("rollout", "revision")),
    Definition("rlhf_gateway_safety_filter_loaded", "gauge", "1 while answers are judged by a safety filter."),
    Definition("rlhf_gateway_errors", "gauge", "Reasons why this pod does not do what its configuration says."),
    Definition("rlhf_gateway_remembered_conversations", "gauge", "Conversations in memory for counting once."),
    Definition(
        "rlhf_gateway_uncounted_conversations", "gauge", "Requests left out of conversation counts: memory full."
    ),
)
CATALOGUE: tuple[Definition, ...] = (
    *(Definition(f"rlhf_gateway_{name}_total", "counter", text, ROW) for name, text in _ROW_COUNTERS.items()),
    *(Definition(f"rlhf_gateway_{name}_total", "counter", text, ROW) for name, text in _EVENTS.items()),
    LATENCY,
    *GAUGES,
)


class EvidenceCollector(Collector):
    """A view of the ledger and the state at scrape time."""

    def __init__(self, rollout: str, ledger: Ledger, state: Callable[[], DataPlaneState]) -> None:
        self._rollout = rollout
        self._ledger = ledger
        self._state = state

    def collect(self) -> Iterator[Metric]:
        evidence = self._ledger.snapshot(0)
        for name, text in _ROW_COUNTERS.items():
            family = CounterMetricFamily(f"rlhf_gateway_{name}", text, labels=ROW)
            for row in evidence.counts:
                family.add_metric(self._labels(row), getattr(row, name))
            yield family
        yield self._latency(evidence.counts, evidence.latency_bounds_ms)
        yield from self._gauges()

    def _labels(self, row: ArmCounts) -> list[str]:
        return [self._rollout, "shadow" if row.shadow else row.arm, row.revision, str(row.stage)]

    def _latency(self, rows: tuple[ArmCounts, ...], bounds_ms: tuple[float, ...]) -> Metric:
        family = HistogramMetricFamily(LATENCY.name, LATENCY.help, labels=LATENCY.labels)
        sums = self._ledger.latency_sums_ms()
        for row in rows:
            cumulative, buckets = 0, []
            for bound, count in zip((*(b / 1000 for b in bounds_ms), float("inf")), row.latency_buckets, strict=True):
                cumulative += count
                buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(cumulative)))
            total = sums[RowKey(row.stage, row.arm, row.revision, row.shadow)] / 1000
            family.add_metric(self._labels(row), buckets=buckets, sum_value=total)
        return family

    def _gauges(self) -> Iterator[Metric]:
        state = self._state()
        single = {
            "rlhf_gateway_config_generation": float(state.generation),
            "rlhf_gateway_canary_weight_percent": state.canary_weight_percent,
            "rlhf_gateway_safety_filter_loaded": float(state.safety_filter is not None),
            "rlhf_gateway_errors": float(len(state.errors)),
            "rlhf_gateway_remembered_conversations": float(self._ledger.remembered),
            "rlhf_gateway_uncounted_conversations": float(self._ledger.uncounted_conversations),
        }
        several = {
            "rlhf_gateway_in_flight": {revision: float(count) for revision, count in state.in_flight.items()},
            "rlhf_gateway_ejected": dict.fromkeys(state.ejected, 1.0),
        }
        for definition in GAUGES:
            family = GaugeMetricFamily(definition.name, definition.help, labels=definition.labels)
            if definition.name in single:
                family.add_metric([self._rollout], single[definition.name])
            for revision, value in several.get(definition.name, {}).items():
                family.add_metric([self._rollout, revision], value)
            yield family


MAX_ROWS = 64  # of one counter, as in the evidence: every stage of every trial is a row of its own


class Metrics:
    """Counters of what is outside the evidence, on a registry of their own. Rows of stages long past are given up."""

    def __init__(self, rollout: str) -> None:
        self.registry = CollectorRegistry()
        self._rollout = rollout
        self._events = {
            name: Counter(f"rlhf_gateway_{name}", text, ROW, registry=self.registry) for name, text in _EVENTS.items()
        }
        self._rows: dict[str, dict[tuple[str, ...], None]] = {name: {} for name in _EVENTS}  # last used last

    def event(self, name: str, arm: str, backend: Backend, stage: int) -> None:
        """Count one event of `_EVENTS`."""
        row, rows = (self._rollout, arm, backend.revision, str(stage)), self._rows[name]
        rows.pop(row, None)
        rows[row] = None
        self._events[name].labels(*row).inc()
        if len(rows) > MAX_ROWS:
            oldest = next(iter(rows))
            del rows[oldest]
            self._events[name].remove(*oldest)

    def attach(self, ledger: Ledger, state: Callable[[], DataPlaneState]) -> None:
        """Export the ledger and the state too."""
        self.registry.register(EvidenceCollector(self._rollout, ledger, state))
