"""Running programs: to their end, or in the background with a log and a mark by which they are known again."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandbox.errors import SandboxError

POLL_SECONDS = 0.05
MARK = "RLHF_SANDBOX_PROCESS"
PROC = Path("/proc")
Ready = Callable[[], bool]


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    log: IO[bytes] | None = None,
) -> str:
    """Runs to the end and returns standard output; with `log`, all output goes there instead.

    Raises SandboxError with the command and the end of what it printed.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=None if env is None else dict(env),
            input=input,
            stdout=subprocess.PIPE if log is None else log,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise SandboxError(f"program not found: {words[0]} (wanted for: {shlex.join(words)})") from None
    if done.returncode != 0:
        said = f"see {log.name}" if log is not None else (done.stderr or done.stdout or "").strip()[-2000:]
        raise SandboxError(f"failed with exit code {done.returncode}: {shlex.join(words)}\n{said}")
    return done.stdout or ""


def wait_until(
    what: str,
    ready: Ready,
    *,
    seconds: float,
    hint: str = "",
    alive: Callable[[], str | None] = lambda: None,
) -> None:
    """Polls `ready` until it is true.

    `alive` returns why waiting is pointless (a process ended), or None. Errors of `ready` count as "not
    yet"; the last one is in the message when time runs out.
    """
    deadline = time.monotonic() + seconds
    last = ""
    while True:
        try:
            if ready():
                return
        except (SandboxError, OSError) as error:
            last = str(error)
        if (reason := alive()) is not None:
            raise SandboxError(f"{what}: {reason}")
        if time.monotonic() > deadline:
            detail = f"; last error: {last}" if last else ""
            raise SandboxError(f"{what}: not there after {seconds:.0f} s{detail}. {hint}".rstrip())
        time.sleep(POLL_SECONDS)


def tied_to_parent(argv: Sequence[str | Path]) -> list[str | Path]:
    """The same command, killed by the kernel when the thread that starts it is gone (where setpriv exists)."""
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []), *argv]


def start(
    argv: Sequence[str | Path],
    *,
    mark: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts in the background, in a session of its own, appending all output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**(os.environ if env is None else env), MARK: mark}
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )


def is_running(pid: int, mark: str) -> bool:
    """Whether this pid is a live process that was started with this mark (pids are reused)."""
    for _ in range(50):
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
            if _state(pid) in ("Z", "X"):
                return False
        except OSError:
            return False
        if environment:
            return f"{MARK}={mark}".encode() in environment.split(b"\0")
        time.sleep(0.002)  # in the middle of an exec the environment is empty for an instant
    return False


def _state(pid: int) -> str:
    # The command name in the second field may hold spaces and parentheses.
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


@dataclass(frozen=True)
class Marked:
    """A live process that carries a mark (or inherited it), and its command line."""

    pid: int
    mark: str
    words: tuple[str, ...]


def scan(prefix: str) -> list[Marked]:
    """Every live process whose mark begins with `prefix`, by pid."""
    wanted = f"{MARK}={prefix}".encode()
    found = []
    for pid in sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):  # gone in between, or another user's
            environment = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
            mark = next((item for item in environment if item.startswith(wanted)), None)
            if mark is not None and _state(pid) not in ("Z", "X"):
                words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                found.append(Marked(pid, mark.decode(errors="replace").partition("=")[2], tuple(words)))
    return found


def end(pid: int, mark: str, *, grace: float) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds (0: at once). Nothing happens to a stranger's pid."""
    deadline = time.monotonic() + grace
    number = signal.SIGTERM if grace > 0 else signal.SIGKILL
    while is_running(pid, mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        while is_running(pid, mark):
            if number == signal.SIGTERM and time.monotonic() > deadline:
                number = signal.SIGKILL
                break
            time.sleep(POLL_SECONDS / 5)


def tail(path: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return f"({path} cannot be read)"
    return "\n".join(text.splitlines()[-lines:])


def memory_mb(pid: int) -> int:
    """Proportional share of memory of one process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1000 for line in lines if line.startswith("Pss:")), 0)
