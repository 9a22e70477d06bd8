"""Step time and memory of our loops against TRL's trainers: same models, same data, same generator lengths.

    python -m benchmarks trl_steps                      everything (on an idle machine; about half an hour)
    python -m benchmarks.trl_steps GRPO-60k-spread ...  single comparisons; the report has all that are kept

Two processes of one thread each take turns, a step of ours, a step of theirs. TRL 1.16 is the peer; PPO left it in
1.13, so that comparison installs 1.12 beside the rest, for itself. Losses are first shown to be equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.report import Report
from benchmarks.trl_peers.world import SIZES, make

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".build" / "peers"
OLD_TRL = "trl==1.12.0"
WARM_UP = 3  # beside the first step of either side
PAGE = 1 << 20


@dataclass(frozen=True)
class Case:
    algorithm: str  # PPO-nogc: TRL's collections taken out
    size: str
    lengths: str

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.size}-{self.lengths}"


CASES = [
    Case(algorithm, size, lengths)
    for size in SIZES
    for algorithm in ("Reward", "DPO", "GRPO", "RLOO", "PPO", "PPO_nogc")
    for lengths in ("equal", "spread")
]


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


def old_trl() -> Path:
    """The last TRL with PPO, alone in a folder: everything it needs is here already."""
    folder = PEERS / "trl-1.12"
    if not (folder / "trl").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / "pip")], check=True)
        pip = [str(PEERS / "pip" / "bin" / "pip"), "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, OLD_TRL], check=True)
    return folder


def compare(case: Case) -> dict[str, Any]:
    world = make(PEERS / "worlds", case.size)
    path = str(old_trl()) if case.algorithm.startswith("PPO") else ""
    sides = [Side("benchmarks.trl_peers.ours", world, case), Side("benchmarks.trl_peers.theirs", world, case, path)]
    try:
        threads = [side.ready() for side in sides]
        steps: list[list[dict[str, float]]] = [[], []]
        for index in range(WARM_UP + SIZES[case.size].timed):
            for side, kept in zip(sides, steps, strict=True):
                figures = side.step()
                if index >= WARM_UP:
                    kept.append(figures)
        peaks = [side.end() for side in sides]
    finally:
        for side in sides:
            side.kill()
    assert threads == [1, 1], f"threads {threads}"
    return {
        "seconds": [[step["seconds"] for step in side] for side in steps],
        "lengths": [sum(step["tokens"] for step in side) / len(side) for side in steps],
        "peaks": peaks,
    }


def check_losses() -> None:
    """Losses and gradients agree with TRL's on recorded batches, before any time is compared."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/trainer/test_trl_oracle.py"]
    subprocess.run(command, check=True, cwd=ROOT)


def report(found: dict[str, dict[str, Any]]) -> None:
    page = Report("trl_steps", "Step time against TRL, one CPU thread", ("torch", "transformers", "deepspeed", "trl"))
    for case in CASES:
        if case.name not in found:
            continue
        kept = found[case.name]
        ours, theirs = kept["seconds"]
        peer = "TRL 1.12" if case.algorithm.startswith("PPO") else "TRL"
        peer += ", its gc.collect taken out" if case.algorithm == "PPO_nogc" else ""
        name = f"{case.algorithm.partition('_')[0]}, {case.size}, {case.lengths} lengths"
        page.add(f"{name}: ours", 1000 * median(ours), "ms/step", samples=len(ours), spread=_iqr(ours))
        page.add(f"{name}: {peer}", 1000 * median(theirs), "ms/step", samples=len(theirs), spread=_iqr(theirs))
        ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        spread = (
            f"IQR {low:.2f} to {high:.2f}; mean response {kept['lengths'][0]:.1f} / {kept['lengths'][1]:.1f} tokens"
        )
        page.add(f"{name}: ratio", median(ours) / median(theirs), "ours / TRL", samples=len(ratios), spread=spread)
        memory = f"ours {kept['peaks'][0] / PAGE:.0f} MiB, {peer} {kept['peaks'][1] / PAGE:.0f} MiB"
        page.add(f"{name}: peak memory", kept["peaks"][0] / kept["peaks"][1], "ours / TRL", samples=1, spread=memory)
    page.note(
        "Two processes in turns, a step each, one thread; the same weights, prompts or pairs, and reward model. Equal: "
        "no reply ends before the limit. Spread: exponential lengths, or what a policy fitted to them samples. Our "
        "steps have in them what TRL's have not: the check of the sampler's log-probs, and metrics of every step."
    )
    page.note(
        "TRL 1.12's PPO collects garbage twice a step, which on models this small is most of its time; read its ratio "
        "only beside the row with those collections taken out, where there is one. Equal losses are checked first "
        "when all cases run, and always by tests/trainer/test_trl_oracle.py."
    )
    page.write()


def _iqr(seconds: list[float]) -> str:
    low, _, high = quantiles(seconds, n=4)
    return f"IQR {1000 * low:.0f} to {1000 * high:.0f} ms"


def main(names: list[str]) -> int:
    kept = PEERS / "results.json"
    PEERS.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    if not names:
        check_losses()
        found = {}
    for case in CASES:
        if not names or case.name in names:
            found[case.name] = compare(case)
            kept.write_text(json.dumps(found))
            ours, theirs = (median(side) for side in found[case.name]["seconds"])
            print(f"{case.name}: {1000 * ours:.1f} / {1000 * theirs:.1f} ms = {ours / theirs:.2f}", flush=True)
    report(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
