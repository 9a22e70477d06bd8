"""What does a Kubernetes on this machine cost: seconds to start, to find it running, to end it, and memory at rest?

Programs must be there already (`make demo` or one `python -m sandbox up`); how long they take to build from nothing is
a row of the demo's benchmark.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

from benchmarks.report import Report
from sandbox import components
from sandbox.cluster import Cluster
from sandbox.processes import memory_mb

SANDBOX = (sys.executable, "-m", "sandbox", "--quiet")
SETTLE_SECONDS = 30.0  # memory is read after the node has been at rest this long


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    times: int = parser.parse_args().times
    if Cluster.from_environment().status().ready:
        print("a sandbox runs in this checkout; end it first: python -m sandbox down", file=sys.stderr)
        return 1
    cluster: dict[str, list[float]] = {"up": [], "up when it runs": [], "down": []}
    plane: dict[str, list[float]] = {"up": [], "down": []}
    for number in range(times):
        cluster["up"].append(timed("up"))
        cluster["up when it runs"].append(timed("up"))
        if number == times - 1:
            time.sleep(SETTLE_SECONDS)
            memory = memory_by_component()
        cluster["down"].append(timed("down"))
        plane["up"].append(timed("up", "--control-plane"))
        plane["down"].append(timed("down", "--control-plane"))
    write(cluster, plane, memory)
    return 0


def timed(*arguments: str) -> float:
    began = time.monotonic()
    subprocess.run((*SANDBOX, *arguments), check=True)
    return time.monotonic() - began


def memory_by_component() -> dict[str, float]:
    """Proportional set size in MB, children of containers excluded: pods are the workload, not the cluster."""
    pids = Cluster.from_environment().status().pids
    return {name: float(memory_mb(pids[name])) for name in components.NAMES if name in pids}


def write(cluster: dict[str, list[float]], plane: dict[str, list[float]], memory: dict[str, float]) -> None:
    report = Report("sandbox", "A Kubernetes on one machine", ())
    for what, runs in (("whole node", cluster), ("control plane alone", plane)):
        for name, seconds in runs.items():
            spread = f"{min(seconds):.2f} to {max(seconds):.2f} s"
            report.add(f"{what}: {name}", median(seconds), "s", samples=len(seconds), spread=spread)
    for name, megabytes in memory.items():
        report.add(f"memory at rest: {name}", megabytes, "MB", samples=1)
    report.add("memory at rest: all of them", sum(memory.values()), "MB", samples=1)
    report.note("up: until the node is Ready, from the start of the command; programs and images are there.")
    report.write()


if __name__ == "__main__":
    sys.exit(main())
