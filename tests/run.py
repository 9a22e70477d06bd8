"""Runs the test tiers in order, each in its own pytest process, and says what it is doing and how long it took.

    python -m tests.run [check | lint | unit | trainer | cluster | e2e | long]...   (default: all but long)

Stops at the first failing tier: a later tier stands on the ones before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
BIN = Path(PYTHON).parent
WORKERS = str(min(4, len(os.sched_getaffinity(0))))  # many tests start several ranks of their own


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    command: tuple[str, ...]


def pytest(*args: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "--durations=5", *args)


LINT = (
    Step("ruff check", "style", (f"{BIN}/ruff", "check", ".")),
    Step("ruff format", "layout", (f"{BIN}/ruff", "format", "--check", ".")),
    Step("mypy", "types, strict", (f"{BIN}/mypy",)),
    Step("import-linter", "layers", (f"{BIN}/lint-imports", "--no-logo")),
    Step("generate", "CRDs, RBAC and references match the code", (PYTHON, "-m", "rlhf_operator.generate", "--check")),
)
# Whole files to each process: what a file's tests share is made once.
SPREAD = ("-n", WORKERS, "--dist", "loadfile", "--no-loadscope-reorder")
UNIT = (Step("unit and property", "pure tests", pytest(*SPREAD, "tests/unit", "tests/property")),)
TIERS: dict[str, tuple[Step, ...]] = {
    "lint": LINT,
    "unit": UNIT,
    "check": LINT + UNIT,
    "trainer": (Step("trainer", "real DeepSpeed on CPU", pytest(*SPREAD, "tests/trainer")),),
    "cluster": (Step("cluster", "real etcd and kube-apiserver", pytest("tests/cluster")),),
    "e2e": (Step("e2e", "real Kubernetes in the sandbox", pytest("tests/e2e")),),
    "long": tuple(
        Step(name, what, (PYTHON, "-m", "benchmarks", name))
        for name, what in (
            ("policy_quality", "five seeds of the whole chain, judged by the oracle"),
            ("offline_quality", "DPO, KTO, SFT and distillation, judged by the oracle"),
            ("preference_loop", "online against offline preference learning, judged by the oracle"),
            ("mutation", "one change at a time in the algorithms"),
            ("gate_seeds", "twenty seeds of good and bad labels before the gates"),
            ("rollout_simulation", "13,000 simulated rollouts"),
        )
    ),
}
DEFAULT = ("check", "trainer", "cluster", "e2e")


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in TIERS]
    if unknown:
        print(f"unknown tier {unknown[0]!r}: choose from {', '.join(TIERS)}", file=sys.stderr)
        return 2
    steps = [step for name in names or DEFAULT for step in TIERS[name]]
    began = time.monotonic()
    rows: list[str] = []
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for number, step in enumerate(steps, 1):
        start = time.monotonic()
        print(f"\n━━ [{number}/{len(steps)}] {step.name}: {step.what} (at {start - began:.0f} s)", flush=True)
        code = subprocess.run(step.command, cwd=ROOT, env=environment, check=False).returncode
        rows.append(f"  {'ok    ' if code == 0 else 'FAILED'} {time.monotonic() - start:7.1f} s  {step.name}")
        if code:
            print("\n" + "\n".join(rows), flush=True)
            print(f"\n{step.name} failed with exit code {code}; run it alone with:\n  {' '.join(step.command)}")
            return code
    print("\n" + "\n".join(rows) + f"\n  total  {time.monotonic() - began:7.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
