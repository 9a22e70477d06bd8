"""How fast the operator is, and how little it writes, on a real etcd and kube-apiserver.

RewardModelJobs are created by a client of their own; what is measured is what that client and the API server's audit
log see, never what the operator says of itself. There are no controllers: a kubelet of the benchmark ends the pods of
the jobs whose whole life is counted. `--jobs`, `--rate` and `--seconds` make it smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from benchmarks.harness.operator import NAMESPACE, ROOT, Bench, bench, until, watch
from benchmarks.report import Report
from rlhf_operator.api.labels import ATTEMPT, OWNER_UID
from rlhf_operator.engine.reconciler import primary_resource
from rlhf_operator.kinds import KINDS
from rlhf_operator.kinds.base import CONFIG_MAP, JOB, PERSISTENT_VOLUME_CLAIM, POD, SERVICE, Resource
from rlhf_operator.kube.api import Api
from sandbox.audit import Request
from tests.property import cluster

PACKAGES = ("kopf", "kubernetes", "aiohttp", "pydantic")
RMJ = primary_resource(next(spec for spec in KINDS if spec.kind == "RewardModelJob"))
LIVES = 20
Dict = dict[str, Any]


def manifest(name: str) -> Dict:
    made: Dict = yaml.safe_load((ROOT / "manifests" / "examples" / "reward-model-job.yaml").read_text())
    made["metadata"] = {"name": name, "namespace": NAMESPACE}
    return made


async def latency(bench: Bench, rate: float, seconds: float) -> tuple[list[float], list[float]]:
    """Open loop: seconds from the reply to POST until our own watch shows the Job, the last of the three children."""
    posted: dict[str, float] = {}
    seen: dict[str, float] = {}
    count = int(rate * seconds)
    watching = asyncio.create_task(watch(bench, JOB, seen))
    await asyncio.sleep(1)

    async def post(name: str) -> None:
        await bench.api.create(RMJ, manifest(name))
        posted[name] = time.monotonic()

    started = time.monotonic()
    tasks = []
    for n in range(count):
        await asyncio.sleep(max(0.0, started + n / rate - time.monotonic()))
        tasks.append(asyncio.create_task(post(f"rate{n:05}")))
    await asyncio.gather(*tasks)

    async def all_seen() -> bool:
        return all(f"{name}-train-a1" in seen for name in posted)

    await until(all_seen)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    lateness = [posted[f"rate{n:05}"] - (started + n / rate) for n in range(count)]
    return sorted(max(0.0, seen[f"{name}-train-a1"] - at) for name, at in posted.items()), lateness


async def materialise(bench: Bench, count: int) -> tuple[float, float]:
    """Of jobs that waited for the operator: jobs per second, from the first to the last child Job created, and the
    operator's processor seconds for each, its start not counted."""
    names = [f"many{n:05}" for n in range(count)]
    await asyncio.gather(*(bench.api.create(RMJ, manifest(name)) for name in names))
    since = datetime.now(UTC)
    bench.operator.start()

    async def done() -> bool:
        return await bench.metric("reconcile_total", 'result="wrote"') >= count

    await until(bench.leads)
    before = bench.operator.cpu_seconds
    await until(done, every=0.5)
    await bench.until_idle()
    spent = bench.operator.cpu_seconds - before
    made = [r.time for r in bench.writes(since) if (r.verb, r.resource, r.code) == ("create", "jobs", 201)]
    assert len(made) == count, f"{len(made)} jobs were created for {count}"
    return count / (max(made) - min(made)).total_seconds(), spent / count


async def restart(bench: Bench) -> tuple[float, float, int, float]:
    """Seconds from the start of the process, and of its leading, until the queue is empty; writes; and the processor
    seconds of a pass, which changes nothing."""
    bench.operator.stop()
    jobs = await bench.count(RMJ)
    since, started = datetime.now(UTC), time.monotonic()
    bench.operator.start()
    await until(bench.leads)
    led, before = time.monotonic(), bench.operator.cpu_seconds
    idle = await bench.until_idle(passes=jobs)
    passes = await bench.metric("reconcile_total")
    return idle - started, idle - led, len(bench.writes(since)), (bench.operator.cpu_seconds - before) / passes


async def lives(bench: Bench, count: int) -> list[Counter[str]]:
    """The operator's writes in each whole life: two pods run and succeed, and the outcome is in the status."""
    since = datetime.now(UTC)
    names = [f"life{n:05}" for n in range(count)]
    await asyncio.gather(*(bench.api.create(RMJ, manifest(name)) for name in names))
    await asyncio.gather(*(_live(bench, name) for name in names))
    await bench.until_idle()
    made = bench.writes(since)
    # Children are named after their job, and Events after what they are about.
    return [Counter(_what(r) for r in made if r.name.startswith(name)) for name in names]


def _what(request: Request) -> str:
    if request.resource == "events":
        return "events"
    return "status patches" if request.subresource == "status" else "children"


async def _live(bench: Bench, name: str) -> None:
    api, job_name = bench.api, f"{name}-train-a1"

    async def started() -> bool:
        return await api.get(JOB, NAMESPACE, job_name) is not None

    async def succeeded() -> bool:
        live = await api.get(RMJ, NAMESPACE, name) or {}
        return bool(live.get("status", {}).get("phase") == "Succeeded")

    await until(started, every=0.2)
    job = await api.get(JOB, NAMESPACE, job_name)
    assert job is not None
    labels = job["metadata"]["labels"]
    pods = [await api.create(POD, pod) for pod in cluster.pods_of(job, job["spec"]["template"])]
    now = datetime.now(UTC)
    pods = [await _status(api, POD, pod, cluster.running(now)) for pod in pods]
    await asyncio.sleep(1)  # it trains
    message = cluster.success(labels[OWNER_UID], int(labels[ATTEMPT]), datetime.now(UTC))
    for pod in pods:
        await _status(api, POD, pod, cluster.ended(pod, 0, message, datetime.now(UTC)))
    await _status(api, JOB, job, cluster.job_ended(job, False, datetime.now(UTC)))
    await until(succeeded, every=0.2)


async def _status(api: Api, resource: Resource, obj: Dict, status: Dict) -> Dict:
    meta = obj["metadata"]
    live = await api.get(resource, NAMESPACE, meta["name"])
    assert live is not None
    return await api.patch_status(resource, NAMESPACE, meta["name"], status, live["metadata"]["resourceVersion"])


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(report: Report, jobs: int, rate: float, seconds: float) -> None:
    async with bench() as made:
        for claim in cluster.claims_for(manifest("any")):
            await made.api.create(PERSISTENT_VOLUME_CLAIM, claim)
        per_second, processor = await materialise(made, jobs)
        report.add("jobs materialised", per_second, "jobs/s", samples=jobs, spread="first to last child Job, audit log")
        report.add("processor time for each", processor * 1000, "ms", samples=jobs)
        report.add("resident memory with them", made.operator.rss_mib, "MiB", samples=1)
        total, leading, writes, a_pass = await restart(made)
        report.add(f"restart with {jobs} jobs: start of the process to queue empty", total, "s", samples=1)
        report.add(f"restart with {jobs} jobs: leading to queue empty", leading, "s", samples=1)
        report.add("writes of that restart", writes, "writes", samples=1, spread="audit log, Lease excepted")
        spread = "all threads, watches included, while the queue empties"
        report.add("processor time of a pass that changes nothing", a_pass * 1000, "ms", samples=jobs, spread=spread)
        before, began = made.cpu_seconds(), time.monotonic()
        times, lateness = await latency(made, rate, seconds)
        took, after = time.monotonic() - began, made.cpu_seconds()
        spread = f"{times[0] * 1000:.0f} to {times[-1] * 1000:.0f} ms"
        what = f"create to children committed at {rate:g} jobs/s"
        report.add(f"{what}, p50", statistics.median(times) * 1000, "ms", samples=len(times), spread=spread)
        report.add(f"{what}, p99", _at(times, 0.99) * 1000, "ms", samples=len(times), spread=spread)
        for name in after:
            spent = after[name] - before[name]
            share = f"{spent / took:.2f} cores of {os.cpu_count()}"
            report.add(
                f"processor time for each job then: {name}", spent / len(times) * 1000, "ms", samples=1, spread=share
            )
        late = max(lateness)
        report.note(f"The load is an open loop; its slowest POST was answered {late * 1000:.0f} ms after it was due.")
        counts = await lives(made, LIVES)
        for what in ("children", "status patches", "events"):
            per_job = [count[what] for count in counts]
            spread = f"{min(per_job)} to {max(per_job)}"
            mean = statistics.fmean(per_job)
            report.add(f"API writes in a job's life: {what}", mean, "writes", samples=LIVES, spread=spread)
        await quiet(report, made)


async def quiet(report: Report, made: Bench, seconds: float = 20.0) -> None:
    await made.until_idle()
    since, before = datetime.now(UTC), made.operator.cpu_seconds
    await asyncio.sleep(seconds)
    children = sum([await made.count(r) for r in (JOB, SERVICE, CONFIG_MAP, POD)])
    count = await made.count(RMJ)
    report.add("writes at rest", len(made.writes(since)), "writes", samples=1, spread=f"{count} jobs, {seconds:g} s")
    report.add("CPU at rest", (made.operator.cpu_seconds - before) / seconds * 100, "%", samples=1)
    report.add(
        "resident memory at the end", made.operator.rss_mib, "MiB", samples=1, spread=f"{count}+{children} objects"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    report = Report("operator_scale", "The operator on etcd and kube-apiserver", PACKAGES)
    load = os.getloadavg()[0]
    asyncio.run(measure(report, arguments.jobs, arguments.rate, arguments.seconds))
    report.note(
        "etcd, kube-apiserver, the operator and the load share the machine's cores and loopback, and etcd does not "
        "wait for the disk. The machine's load average was "
        f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end."
    )
    report.write()


if __name__ == "__main__":
    main()
