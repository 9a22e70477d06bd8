"""How long is the way from a clone to a judged, delivered policy?

The committed state is cloned into ``.build`` and `make demo` is run there, with empty caches, then once more
with everything it built. Downloads are part of the first figure: it is one of this network too. With `--warm`, this
user's caches are used and the second figure alone is written, as `demo_warm`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report

ROOT = Path(__file__).resolve().parent.parent
FIELD = ROOT / ".build" / "demo"
# What `make demo` prints when a part is behind it.
MARKS = {
    "Python environment installed": "1. A cluster, the operator and data",
    "Kubernetes up": "images: python -m sandbox load",
    "operator installed by Helm": "operator installed by Helm",
    "first job applied": "2. ",
}


@dataclass(frozen=True)
class Run:
    """Seconds since `make demo` was typed."""

    marks: dict[str, float]
    decisions: dict[str, float]  # what the chain decided → when
    total: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", action="store_true", help="use this user's caches: only the second figure counts")
    arguments = parser.parse_args()
    checkout = clone()
    environment = {**os.environ} if arguments.warm else {**os.environ, **empty_caches(FIELD / "caches")}
    load = os.getloadavg()[0]
    try:
        first = play(checkout, environment)
        again = play(checkout, environment)
    finally:
        subprocess.run(["make", "down"], cwd=checkout, env=environment, check=False)
    write(checkout, None if arguments.warm else first, again, load)
    shutil.rmtree(FIELD)
    return 0


def clone() -> Path:
    checkout = FIELD / "checkout"
    if checkout.is_dir():  # of a run that was cut: its cluster may still be up
        subprocess.run(["make", "down"], cwd=checkout, check=False)
        shutil.rmtree(FIELD)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    return checkout


def empty_caches(folder: Path) -> dict[str, str]:
    """Every cache that the build uses, somewhere empty: uv, pip, Go, and the project's own."""
    names = {
        "XDG_CACHE_HOME": "user",
        "UV_CACHE_DIR": "uv",
        "PIP_CACHE_DIR": "pip",
        "GOPATH": "go",
        "GOCACHE": "gocache",
    }
    return {variable: str(folder / name) for variable, name in names.items()} | {"GOFLAGS": "-modcacherw"}


def play(checkout: Path, environment: dict[str, str]) -> Run:
    began = time.monotonic()
    marks: dict[str, float] = {}
    story_zero = 0.0
    process = subprocess.Popen(
        ["make", "demo"], cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        for name, text in MARKS.items():
            if text in line and name not in marks:
                marks[name] = time.monotonic() - began
                story_zero = marks[next(iter(MARKS))]
    if process.wait():
        raise SystemExit(f"make demo ended with {process.returncode}; its words are above")
    total = time.monotonic() - began
    story = json.loads((checkout / ".demo" / "story.json").read_text())
    return Run(marks, {entry["what"]: story_zero + entry["at"] for entry in story["entries"]}, total)


def write(checkout: Path, cold: Run | None, warm: Run, load: float) -> None:
    report = Report(
        "demo_warm" if cold is None else "demo",
        "make demo, from the command to the last line",
        ("torch", "deepspeed", "kopf"),
        checkout=checkout,
        rerun="python -m benchmarks.demo --warm" if cold is None else None,
    )
    for kind, run in (("empty caches", cold), ("everything built", warm)):
        if run is None:
            continue
        for name, seconds in (run.marks | run.decisions).items():
            report.add(f"{kind}: {name}", seconds, "s", samples=1)
        report.add(f"{kind}: whole", run.total, "s", samples=1)
    if cold is not None:
        report.note(
            "Empty caches: no Python package, no Go module, no built program and no image; downloads are counted."
        )
    report.note(f"The machine's load average was {load:.1f} when it began.")
    report.write()


if __name__ == "__main__":
    sys.exit(main())
