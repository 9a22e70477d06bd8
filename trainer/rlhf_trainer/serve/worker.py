"""The one thread that owns the model: takes questions from a bounded queue, writes tokens to each one's reader.

Per pass: let waiting sequences join, advance all by one token, let finished ones go. Readers live on the event loop;
`Emit` hands the events over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf_trainer.serve.batch import Batch, Row
from rlhf_trainer.serve.loader import Policy
from rlhf_trainer.serve.metrics import Metrics
from rlhf_trainer.serve.protocol import FinishReason, RequestError, Usage
from rlhf_trainer.serve.text import StopText, TextStream


@dataclass(frozen=True)
class Piece:
    """Text that is final."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Broken:
    """The end of an answer that failed."""

    error: RequestError


Event = Piece | Finished | Broken


Emit = Callable[[Event], object]  # called from the worker's thread


@dataclass(eq=False)
class Job:
    """One answer to write. `cancelled` may be set from any thread."""

    row: Row
    max_tokens: int
    stops: tuple[str, ...]
    emit: Emit
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: float = 0.0
    written: int = 0
    last_token: float = 0.0


class Writer:
    """The text side of one job."""

    def __init__(self, job: Job, policy: Policy) -> None:
        self.job = job
        self._ends = policy.end_ids
        self._text = TextStream(policy.decode)
        self._stop = StopText(job.stops)

    def take(self, token: int) -> FinishReason | None:
        """Give out what a token adds; how the answer ended, if it did."""
        self.job.written += 1
        if token in self._ends:
            self._give(self._stop.push(self._text.flush()) + self._stop.flush())
            return "stop"
        self._give(self._stop.push(self._text.push(token)))
        if self._stop.stopped:
            return "stop"
        if self.job.written >= self.job.max_tokens:
            self._give(self._stop.push(self._text.flush()) + self._stop.flush())
            return "stop" if self._stop.stopped else "length"
        return None

    def _give(self, text: str) -> None:
        if text:
            self.job.emit(Piece(text))


class Worker:
    """Runs a policy. `submit` from the event loop, everything else on its own thread."""

    def __init__(
        self,
        policy: Policy,
        metrics: Metrics,
        max_batch: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._writers: list[Writer] = []
        self._batch = Batch(policy.model, policy.pad_id)
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="policy-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the token it is at; what is unfinished is broken off."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises RequestError (503) when the queue is full of clients that still wait."""
        with self._wake:
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(one for one in self._waiting if not one.cancelled.is_set())
            if len(self._waiting) >= self._max_waiting:
                message = f"The server is overloaded: {len(self._waiting)} requests wait already. Retry later."
                raise RequestError(message, 503, "overloaded")
            job.arrived = self._clock()
            self._waiting.append(job)
            self._wake.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._admit()
                self._advance()
            except Exception as error:  # a failing forward pass must break these answers, not the server
                self._break_all(error)
            self._metrics.queue(running=len(self._writers), waiting=len(self._waiting))
        self._break_all(RuntimeError("the server is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._writers or self._stopping):
                self._wake.wait()
            return not self._stopping

    def _admit(self) -> None:
        with self._wake:
            free = self._max_batch - len(self._writers)
            jobs = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        jobs = [job for job in jobs if not job.cancelled.is_set()]
        if not jobs:
            return
        now = self._clock()
        for job in jobs:
            self._metrics.queued(now - job.arrived)
        self._writers += [Writer(job, self._policy) for job in jobs]
        tokens = self._batch.join([job.row for job in jobs])
        self._take([None] * (len(self._writers) - len(jobs)) + tokens)

    def _advance(self) -> None:
        if self._writers:
            self._take(list(self._batch.step()))

    def _take(self, tokens: list[int] | list[int | None]) -> None:
        """Hand each row its token (None: none for it in this pass) and let the finished ones go."""
        kept: list[int] = []
        for index, (writer, token) in enumerate(zip(self._writers, tokens, strict=True)):
            if writer.job.cancelled.is_set():
                continue
            if token is None or not self._finish(writer, token):
                kept.append(index)
        if len(kept) < len(self._writers):
            self._batch.keep(kept)
            self._writers = [self._writers[index] for index in kept]

    def _finish(self, writer: Writer, token: int) -> bool:
        job, now = writer.job, self._clock()
        if job.written:
            self._metrics.token(now - job.last_token)
        else:
            self._metrics.first_token(now - job.arrived, len(job.row.prompt))
        job.last_token = now
        reason = writer.take(token)
        if reason is None:
            return False
        self._metrics.finished(reason, now - job.arrived)
        job.emit(Finished(reason, Usage(len(job.row.prompt), job.written)))
        return True

    def _break_all(self, error: Exception) -> None:
        with self._wake:
            waiting = list(self._waiting) if self._stopping else []
            if self._stopping:
                self._waiting.clear()
        broken = RequestError(f"The answer broke off: {error}. Retry.", 503 if self._stopping else 500, "broken_off")
        for job in (*(writer.job for writer in self._writers), *waiting):
            job.emit(Broken(broken))
        self._writers = []
        self._batch = Batch(self._policy.model, self._policy.pad_id)
