"""What rank 0 shows of a running attempt: ``/status`` (StatusReport) and ``/metrics`` (Prometheus). No torch.

Served by a daemon thread; whatever goes wrong in it, training goes on. The board is only ever replaced whole, so a
reader sees a consistent report without waiting for the trainer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.registry import Collector

from rlhf_trainer.metrics import CATALOGUE, PREFIX, check
from rlhf_trainer.wire import CheckpointRecord, GuardrailReport, ReportPhase, SkippedCheckpoint, StatusReport, Verdict

log = logging.getLogger(__name__)

_CHECKPOINTS_SHOWN = 20
_PACE_STEPS, _LEAST_STEPS = 50, 3  # the pace is that of the last 50 steps, and unknown before the third


class StatusBoard:
    """The latest report. Updates come from the training thread, reads from the server's."""

    def __init__(self, attempt: int, uid: str, world_size: int, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pace = Pace()
        now = clock()
        self._report = StatusReport(
            attempt=attempt,
            uid=uid,
            world_size=world_size,
            phase=ReportPhase.INITIALIZING,
            started_at=now,
            updated_at=now,
        )

    @property
    def report(self) -> StatusReport:
        return self._report

    def phase(self, phase: ReportPhase) -> None:
        self._update(phase=phase)

    def resumed(
        self,
        step: int,
        total_steps: int,
        source: CheckpointRecord | None,
        skipped: Sequence[SkippedCheckpoint],
    ) -> None:
        self._update(
            phase=ReportPhase.TRAINING,
            step=step,
            total_steps=total_steps,
            resumed_from=source,
            skipped_checkpoints=tuple(skipped),
        )

    def step(self, step: int, metrics: Mapping[str, float], guardrails: Sequence[GuardrailReport]) -> None:
        self.figures(metrics)
        now = self._clock()
        ends = self._pace.last_step(now, self._report.total_steps - step)
        self._update(step=step, guardrails=tuple(guardrails), last_step_at=now, expected_end_at=ends)

    def figures(self, metrics: Mapping[str, float]) -> None:
        """Adds or replaces figures; every name must be in the catalogue."""
        check(metrics)
        self._update(metrics={**self._report.metrics, **metrics})

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._update(checkpoints=(*self._report.checkpoints, record)[-_CHECKPOINTS_SHOWN:])

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        self._update(verdicts=tuple(verdicts))

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update={**changes, "updated_at": self._clock()})


class Pace:
    """How fast steps come, looks and checkpoints between them included."""

    def __init__(self) -> None:
        self._ends: deque[datetime] = deque(maxlen=_PACE_STEPS + 1)

    def last_step(self, now: datetime, left: int) -> datetime | None:
        """When the last step will end, ``left`` after the one that ended now; None before the pace is known."""
        self._ends.append(now)
        steps = len(self._ends) - 1
        return now + (now - self._ends[0]) / steps * left if steps >= _LEAST_STEPS else None


class BoardCollector(Collector):
    """Prometheus families as a pure function of the board's report."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[MetricFamily]:
        report = self._board.report
        yield _gauge("step", "Optimiser steps done.", report.step)
        yield _gauge("total_steps", "Optimiser steps of the whole run.", report.total_steps)
        yield _gauge("attempt", "Number of this attempt.", report.attempt)
        yield _gauge("world_size", "Ranks of this attempt.", report.world_size)
        yield _gauge("heartbeat_timestamp_seconds", "When the trainer last reported.", report.updated_at.timestamp())
        if report.last_step_at is not None:
            yield _gauge("last_step_timestamp_seconds", "When the last step ended.", report.last_step_at.timestamp())
        if report.expected_end_at is not None:
            at = report.expected_end_at.timestamp()
            yield _gauge("expected_end_timestamp_seconds", "When the last step will end, at the present pace.", at)
        if report.checkpoints:
            yield _gauge("checkpoint_step", "Step of the newest checkpoint.", report.checkpoints[-1].step)
        phase = GaugeMetricFamily(PREFIX + "phase", "1 for the current phase.", labels=["phase"])
        for candidate in ReportPhase:
            phase.add_metric([candidate.value], float(candidate is report.phase))
        yield phase
        rails = GaugeMetricFamily(PREFIX + "guardrail_breached", "1 while breached.", labels=["metric", "action"])
        breached = {(rail.metric, rail.action) for rail in report.guardrails if rail.state == "Breached"}
        # A metric may have several limits with one action: one series, or Prometheus would keep any of them.
        for labels in dict.fromkeys((rail.metric, rail.action) for rail in report.guardrails):
            rails.add_metric(labels, float(labels in breached))
        yield rails
        for name, value in sorted(report.metrics.items()):
            metric = CATALOGUE[name]
            yield GaugeMetricFamily(metric.prometheus_name, f"{metric.meaning} Unit: {metric.unit}.", value=value)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, meaning, value=value)


class StatusServer:
    """``with StatusServer(board, port): ...``; a port that cannot be had is logged, and training goes on unseen."""

    def __init__(self, board: StatusBoard, port: int, host: str = "") -> None:
        self._board = board
        self._address = (host, port)
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int | None:
        return None if self._server is None else int(self._server.server_address[1])

    def __enter__(self) -> StatusServer:
        try:
            self._server = ThreadingHTTPServer(self._address, _handler(self._board))
        except OSError as error:
            log.warning("status is not served: port %d: %s; the operator will see no progress", self._address[1], error)
            return self
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="status", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _handler(board: StatusBoard) -> type[BaseHTTPRequestHandler]:
    registry = CollectorRegistry()
    registry.register(BoardCollector(board))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/status":
                self._answer(200, "application/json", board.report.to_json().encode())
            elif self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry))
            else:
                self._answer(404, "text/plain", b"ask for /status or /metrics\n")

        def _answer(self, code: int, content_type: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Polls every few seconds are not worth a line each."""

    return Handler
