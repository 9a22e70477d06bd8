"""A tracker behind a thread and a bounded queue: dead or slow, it can neither fail training nor hold it up."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlhf_trainer.tracking.base import Dataset, RunInfo, Tracker

log = logging.getLogger(__name__)

_CAPACITY = 1000  # events; about as many steps
_FINISH_SECONDS = 10.0  # waited for at the end, at most
_RETRY_SECONDS = 30.0  # between two attempts to open a run


@dataclass(frozen=True)
class _Event:
    """``call`` on the tracker; ``opening`` events are kept until the tracker has taken them."""

    name: str
    call: Callable[[Tracker], None]
    opening: bool = False


class Background:
    """Delivers to the tracker of ``make`` from a daemon thread. No method raises or waits, but ``finish``.

    When the queue is full the newest event is dropped; every kind of error is logged once.
    """

    def __init__(
        self,
        make: Callable[[], Tracker],
        capacity: int = _CAPACITY,
        finish_seconds: float = _FINISH_SECONDS,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        self._make = make
        self._finish_seconds, self._retry_seconds = finish_seconds, retry_seconds
        self._queue: queue.Queue[_Event | None] = queue.Queue(capacity)
        self._logged: set[tuple[str, str]] = set()
        self._opening: list[_Event] = []
        self._opened, self._retry_at = False, 0.0
        self._tracker: Tracker | None = None
        self._thread = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)
        self._thread.start()
        self.dropped = 0  # events that found the queue full

    def start(self, run: RunInfo) -> None:
        self._put(_Event("start", lambda tracker: tracker.start(run), opening=True))

    def params(self, values: Mapping[str, str]) -> None:
        self._put(_Event("params", lambda tracker: tracker.params(values), opening=True))

    def dataset(self, dataset: Dataset) -> None:
        self._put(_Event("dataset", lambda tracker: tracker.dataset(dataset), opening=True))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._put(_Event("metrics", lambda tracker: tracker.metrics(step, values)))

    def artifact(self, path: str, digest: str) -> None:
        self._put(_Event("artifact", lambda tracker: tracker.artifact(path, digest)))

    def finish(self, succeeded: bool, reason: str, message: str) -> None:
        """Ends the run and waits for what is still queued, for a few seconds at most."""
        deadline = time.monotonic() + self._finish_seconds
        last = _Event("finish", lambda tracker: tracker.finish(succeeded, reason, message))
        for event in (last, None):
            try:
                self._queue.put(event, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                self.dropped += 1
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() or self.dropped:
            log.warning(
                "the tracker did not keep up: %d events dropped, about %d undelivered; metrics.jsonl has every step",
                self.dropped, self._queue.qsize(),
            )  # fmt: skip

    def _put(self, event: _Event) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def _deliver_all(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._deliver(event)
            except Exception as error:  # whatever a tracker's client raises, training goes on
                self._log_once(event, error)

    def _deliver(self, event: _Event) -> None:
        if event.opening:
            self._opening.append(event)
        if self._opened:
            event.call(self._reached())
        elif event.name == "finish" or time.monotonic() >= self._retry_at:
            self._open()
            if not event.opening:
                event.call(self._reached())

    def _open(self) -> None:
        """Tells an unopened tracker how the run began, all of it: it may have been down at the time."""
        try:
            for event in self._opening:
                event.call(self._reached())
        except Exception:
            self._retry_at = time.monotonic() + self._retry_seconds
            raise
        self._opened = True

    def _reached(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._make()
        return self._tracker

    def _log_once(self, event: _Event, error: Exception) -> None:
        kind = (event.name, type(error).__name__)
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning("tracking %s failed (%s: %s); training goes on", event.name, type(error).__name__, error)
