"""The first process of a training pod: starts torchrun, watches over it, and says how the attempt ended. No torch.

torchrun's agent exits 1 whatever its worker returned, so the class of the ending travels by files (``ranks``). This
process brings the inputs that lie in an object store, forwards SIGTERM to the ranks (their agent would kill them after
30 s), ends an attempt whose ranks do not meet or do not move, and writes the termination message, ``result.json`` and
the exit code, which agree.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from rlhf_trainer.attempt import read_config, result_path, write_result, write_termination_message
from rlhf_trainer.cgroup import oom_kills
from rlhf_trainer.ending import Observed, decide
from rlhf_trainer.exits import Ended, Invalid, NoProgress, Preempted, RendezvousFailed
from rlhf_trainer.inputs import as_written, inputs_of
from rlhf_trainer.inputs.fetch import fetch
from rlhf_trainer.ranks import FOLDER_VARIABLE, RankState, last_beat, read_results, read_states
from rlhf_trainer.wire import AttemptConfig, FailureClass, Result

log = logging.getLogger("rlhf_trainer.launch")

_POLL_SECONDS = 0.1
_STRAGGLER_SECONDS = 15.0  # for the ranks that wait in a collective for one that has already failed
_REPORT_SECONDS = 3.0  # of the grace period, kept for writing the result


class Supervisor:
    """Watches torchrun and its ranks until they end or must be ended. ``intervention`` says why it ended them."""

    def __init__(
        self, config: AttemptConfig, ranks_folder: Path, torchrun: subprocess.Popen[bytes], meet_within: float
    ) -> None:
        self._config = config
        self._meet_within = meet_within
        self._folder = ranks_folder
        self._torchrun = torchrun
        self._began = time.monotonic()
        self._stop_at: float | None = None
        self._failed_at: float | None = None
        self.intervention: Ended | None = None

    def request_stop(self) -> None:
        """SIGTERM: the ranks finish their step, save and end; what has not begun to train just ends."""
        if self._stop_at is None:  # a pod that is deleted again is killed no later
            self._stop_at = time.monotonic()
        states = read_states(self._folder)
        for state in states.values():
            _signal(state.pid, signal.SIGTERM)
        if not _all_joined(states):
            self._end(Preempted("SIGTERM before training began; nothing was lost"))

    def watch(self) -> int:
        """Returns torchrun's exit code."""
        while (code := self._torchrun.poll()) is None:
            if self.intervention is None:
                reason = self._why_end(time.monotonic())
                if reason is not None:
                    self._end(reason)
            time.sleep(_POLL_SECONDS)
        for state in read_states(self._folder).values():
            _signal(state.pid, signal.SIGKILL)  # none is left, unless torchrun itself was killed
        return code

    def _why_end(self, now: float) -> Ended | None:
        config, states = self._config, read_states(self._folder)
        if self._stop_at is not None and now - self._stop_at > config.grace_seconds - _REPORT_SECONDS:
            return Preempted(f"SIGTERM, but no checkpoint within {config.grace_seconds} s; raise the grace period")
        if not _all_joined(states):
            if now - self._began > self._meet_within:
                return RendezvousFailed(
                    f"the {config.world_size} ranks did not meet within {self._meet_within:.0f} s; "
                    "check that every pod of the attempt was scheduled and started"
                )
            return None
        beat = last_beat(self._folder)
        if beat is not None and time.time() - beat > config.no_progress_seconds:
            return NoProgress(
                f"no step ended within {config.no_progress_seconds} s; a rank hangs or a step is too slow"
            )
        return self._stragglers(now)

    def _stragglers(self, now: float) -> Ended | None:
        """A rank failed by itself while others still run: they may wait for it for ever."""
        results = read_results(self._folder).values()
        if all(result.failure_class is FailureClass.SUCCESS for result in results):
            return None
        if self._failed_at is None:
            self._failed_at = now
        return Ended("ended after another rank") if now - self._failed_at > _STRAGGLER_SECONDS else None

    def _end(self, reason: Ended) -> None:
        """Kills all of torchrun's session; ranks that hang in a collective heed nothing less."""
        log.error("ending the attempt: %s", reason.message)
        self.intervention = reason
        for state in read_states(self._folder).values():
            _signal(state.pid, signal.SIGKILL)
        _signal(self._torchrun.pid, signal.SIGKILL)


class _StopRequest:
    """SIGTERM may come at any time: ``action`` is what it asks for just then; without one it waits for the next."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._ask())

    def hand_to(self, action: Callable[[], None]) -> None:
        self.action = action
        if self._asked:
            action()

    def _ask(self) -> None:
        self._asked = True
        if self.action is not None:
            self.action()


def _preempt() -> NoReturn:
    raise Preempted("SIGTERM before training began; nothing was lost")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        config = read_config()
    except Invalid as invalid:
        log.error("%s", invalid.message)
        return _report(None, decide(None, Observed(intervention=invalid), _now()))
    with tempfile.TemporaryDirectory(prefix="rlhf-ranks-") as folder:
        result = launch(config, Path(folder))
    return _report(config, result)


def launch(config: AttemptConfig, ranks_folder: Path) -> Result:
    """Runs the attempt's ranks of this node to their end."""
    kills_before, began, stop = oom_kills(), time.monotonic(), _StopRequest(_preempt)
    try:
        bring_inputs(config)
        # The other pods load the same bytes, perhaps half as fast, and hash them before they come.
        meet_within = config.rendezvous_seconds + 2 * (time.monotonic() - began)
        wait_for_name(os.environ.get("PET_MASTER_ADDR", "localhost"), config.rendezvous_seconds)
    except Ended as ended:
        return decide(config, Observed(intervention=ended), _now())
    finally:
        stop.action = None
    torchrun = _start_torchrun(ranks_folder, meet_within)
    supervisor = Supervisor(config, ranks_folder, torchrun, meet_within)
    stop.hand_to(supervisor.request_stop)
    code = supervisor.watch()
    kills_after = oom_kills()
    observed = Observed(
        results=read_results(ranks_folder),
        states=read_states(ranks_folder),
        intervention=supervisor.intervention,
        oom_killed=kills_before is not None and kills_after is not None and kills_after > kills_before,
        exit_code=code,
    )
    return decide(config, observed, _now())


def _start_torchrun(ranks_folder: Path, meet_within: float) -> subprocess.Popen[bytes]:
    """Its own limit, 10 minutes if nothing is said, is put behind the supervisor's, which says what was waited for."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--rdzv-conf=timeout={meet_within + 60:.0f}"]
    return subprocess.Popen(
        [*command, "--module", "rlhf_trainer.worker"],
        env={**os.environ, FOLDER_VARIABLE: str(ranks_folder)},
        start_new_session=True,  # a terminal's Ctrl-C reaches the ranks through this process only
    )


def bring_inputs(config: AttemptConfig) -> None:
    """What lies in an object store, to this pod's disk. The digests of the first pod's are checked by rank 0."""
    stored = [each for each in inputs_of(config) if each.is_stored]
    fetch(stored, again=config.attempt > 1)
    if not _is_first():
        for each in stored:
            each.check()


def wait_for_name(name: str, seconds: float, resolve: Callable[[str], object] = socket.gethostbyname) -> None:
    """Waits until the first pod's name resolves: a headless Service takes a moment to publish it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            resolve(name)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousFailed(
                    f"{name} does not resolve after {seconds:.0f} s: {error}; check the headless Service and the DNS"
                ) from error
            time.sleep(_POLL_SECONDS)
        else:
            return


def _report(config: AttemptConfig | None, result: Result) -> int:
    if config is not None:
        result = result.model_copy(update={"message": as_written(result.message, config)})
    if config is not None and _is_first():
        try:
            write_result(result_path(config), result)
        except OSError as error:  # the message below still tells; without a volume nothing else can
            log.error("result.json could not be written: %s", error)
    write_termination_message(result)
    log.info("%s (exit %d): %s", result.failure_class.value, result.exit_code, result.message)
    return result.exit_code


def _is_first() -> bool:
    return os.environ.get("PET_NODE_RANK", "0") == "0"


def _all_joined(states: Mapping[int, RankState]) -> bool:
    return bool(states) and all(state.joined for state in states.values())


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has ended meanwhile


def _now() -> datetime:
    return datetime.now(UTC)


def run() -> NoReturn:
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of the store's client that is not done would abort an orderly shutdown: 134, not the code


if __name__ == "__main__":
    run()
