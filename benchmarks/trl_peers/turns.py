"""Two processes that take turns, a step each: what slows the machine down slows both of them down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".build" / "peers"
WARM_UP = 3  # beside the first step of either side


@dataclass(frozen=True)
class Case:
    algorithm: str  # PPO_nogc: TRL's collections taken out
    size: str
    lengths: str

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.size}-{self.lengths}"


class Side:
    """One process; ``step`` lets it take one."""

    def __init__(self, module: str, world: Path, case: Case, path: str = "") -> None:
        paths = [path, str(ROOT), str(ROOT / "trainer"), str(ROOT / "operator")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPYCACHEPREFIX": str(PEERS / "bytecode"),  # starting must not take longer than measuring
            "PYTHONPATH": os.pathsep.join(part for part in paths if part),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        ours = module.endswith("ours")
        arguments = [str(world), case.algorithm.partition("_")[0] if ours else case.algorithm, case.size, case.lengths]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            cwd=ROOT,
        )

    def ready(self) -> int:
        """Waits for the first step; returns the threads it ran on."""
        return int(self._read()["threads"])

    def step(self) -> dict[str, float]:
        self._write("step")
        return self._read()

    def end(self) -> float:
        """Peak resident memory in bytes."""
        self._write("end")
        peak = self._read()["peak"]
        self._process.wait(60)
        return float(peak)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode(errors="replace")[-3000:])
        found: dict[str, Any] = json.loads(line)
        return found


def take_turns(sides: list[Side], timed: int) -> dict[str, Any]:
    """Seconds of every step by side, mean tokens of a response and peak memory of each; both are ended."""
    steps: list[list[dict[str, float]]] = [[] for _ in sides]
    try:
        threads = [side.ready() for side in sides]
        assert set(threads) == {1}, f"threads {threads}"
        for index in range(WARM_UP + timed):
            for side, kept in zip(sides, steps, strict=True):
                figures = side.step()
                if index >= WARM_UP:
                    kept.append(figures)
        peaks = [side.end() for side in sides]
    finally:
        for side in sides:
            side.kill()
    return {
        "seconds": [[step["seconds"] for step in side] for side in steps],
        "replies": [sum(step["reply"] for step in side) / len(side) for side in steps],
        "peaks": peaks,
    }


def iqr(seconds: list[float]) -> str:
    low, _, high = quantiles(seconds, n=4)
    return f"IQR {1000 * low:.0f} to {1000 * high:.0f} ms"
