"""The server's metrics, under vLLM's names where the meaning is the same, so that its dashboards work unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rlhf_trainer.serve.protocol import FinishReason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Definition:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model_name",)


CATALOGUE: tuple[Definition, ...] = (
    Definition("vllm:num_requests_running", "gauge", "Answers being written."),
    Definition("vllm:num_requests_waiting", "gauge", "Requests waiting for a place in the batch."),
    Definition("vllm:prompt_tokens_total", "counter", "Prompt tokens read."),
    Definition("vllm:generation_tokens_total", "counter", "Tokens written."),
    Definition("vllm:request_success_total", "counter", "Whole answers.", ("model_name", "finished_reason")),
    Definition("vllm:time_to_first_token_seconds", "histogram", "From arrival to the first token, seconds."),
    Definition("vllm:inter_token_latency_seconds", "histogram", "Between two tokens of an answer, seconds."),
    Definition("vllm:e2e_request_latency_seconds", "histogram", "From arrival to the last token, seconds."),
    Definition("vllm:request_queue_time_seconds", "histogram", "Waiting for a place in the batch, seconds."),
)


class Metrics:
    """All metrics of one server. Thread-safe."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for one in CATALOGUE:
            key = one.name.removeprefix("vllm:")
            if one.kind == "gauge":
                self._gauges[key] = Gauge(one.name, one.help, one.labels, registry=self.registry)
            elif one.kind == "counter":
                self._counters[key] = Counter(one.name, one.help, one.labels, registry=self.registry)
            else:
                self._histograms[key] = Histogram(
                    one.name, one.help, one.labels, registry=self.registry, buckets=_SECONDS
                )

    def queue(self, *, running: int, waiting: int) -> None:
        self._gauges["num_requests_running"].labels(self._name).set(running)
        self._gauges["num_requests_waiting"].labels(self._name).set(waiting)

    def queued(self, seconds: float) -> None:
        self._observe("request_queue_time_seconds", seconds)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self._observe("time_to_first_token_seconds", seconds)
        self._counters["prompt_tokens_total"].labels(self._name).inc(prompt_tokens)
        self._counters["generation_tokens_total"].labels(self._name).inc()

    def token(self, seconds: float) -> None:
        self._observe("inter_token_latency_seconds", seconds)
        self._counters["generation_tokens_total"].labels(self._name).inc()

    def finished(self, reason: FinishReason, seconds: float) -> None:
        self._observe("e2e_request_latency_seconds", seconds)
        self._counters["request_success_total"].labels(self._name, reason).inc()

    def _observe(self, name: str, seconds: float) -> None:
        self._histograms[name].labels(self._name).observe(seconds)
