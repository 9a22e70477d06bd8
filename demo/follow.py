"""Follows one resource until it has settled, telling what changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from demo.cluster import Cluster, CommandError, Object
from demo.story import RolloutPoint, Story
from demo.view import View

PATIENCE_SECONDS = 900


def conditions(live: Object) -> dict[str, Mapping[str, Any]]:
    return {c["type"]: c for c in live.get("status", {}).get("conditions", ())}


def is_true(live: Object, condition: str) -> bool:
    return conditions(live).get(condition, {}).get("status") == "True"


def why(live: Object, *types: str) -> str:
    """Reason and message of the first named condition that is there."""
    for name in types:
        if found := conditions(live).get(name):
            return f"{found.get('reason')}: {found.get('message', '')}".rstrip(": ")
    return "no reason given"


def job(cluster: Cluster, view: View, resource: str, name: str) -> Object:
    """Follows a training job to Succeeded or Failed and returns it as it ended."""

    def line(live: Object) -> str:
        status = live.get("status", {})
        progress = status.get("progress") or {}
        text = str(status.get("phase", "Pending"))
        if progress.get("totalSteps"):
            text += f", step {progress.get('step', 0)} of {progress['totalSteps']}"
        metrics = status.get("metrics", {})
        return text + "".join(f", {k} {metrics[k]:.3g}" for k in ("reward", "kl", "loss") if k in metrics)

    def settled(live: Object) -> bool:
        return live.get("status", {}).get("phase") in ("Succeeded", "Failed")

    return until(cluster, view, resource, name, settled, line)


def rollout(
    cluster: Cluster, view: View, story: Story, name: str, act: str, settled: Callable[[Object], bool]
) -> Object:
    """Follows a rollout and keeps its timeline under `act`."""
    points = story.timeline.setdefault(act, [])

    def line(live: Object) -> str:
        status = live.get("status", {})
        weight = float((status.get("weights") or {}).get("written") or 0.0)
        stage = int(status.get("stage") or 0)
        point = RolloutPoint(view.elapsed, status.get("phase", "Pending"), stage, weight, candidate(status))
        if not points or (points[-1].phase, points[-1].weight) != (point.phase, point.weight):
            points.append(point)
        text = f"{point.phase}, canary {weight:g}%"
        for verdict in status.get("verdicts", ()):
            needed = f", {verdict['needed']} more" if verdict.get("needed") else ""
            text += f" · {verdict.get('metric')} {verdict.get('state')} (n={verdict.get('n', 0)}{needed})"
        return text

    return until(cluster, view, "policyrollout", name, settled, line)


def candidate(status: Mapping[str, Any]) -> str:
    """Digest of the revision under test, or of the one that was taken out last."""
    states = ("Candidate", "Rejected", "Draining")
    found = [str(r["digest"]) for r in status.get("revisions", ()) if r.get("state") in states]
    return found[-1] if found else ""


def until(
    cluster: Cluster,
    view: View,
    resource: str,
    name: str,
    settled: Callable[[Object], bool],
    line: Callable[[Object], str],
) -> Object:
    view.command(f"kubectl get {resource} {name} -n {cluster.namespace} --watch")
    deadline = time.monotonic() + PATIENCE_SECONDS
    with view.following(f"{resource}/{name}") as follow:
        for live in cluster.watch(resource, name):
            follow.show(line(live))
            if settled(live):
                return live
            if time.monotonic() > deadline:
                break
    raise CommandError(
        f"{resource}/{name} did not settle in {PATIENCE_SECONDS} s; look at:\n"
        f"  kubectl describe {resource} {name} -n {cluster.namespace}"
    )
