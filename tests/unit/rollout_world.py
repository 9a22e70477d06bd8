"""A small cluster in memory around the real plan of a PolicyRollout: writes, pods, endpoints, gateways, traffic.

Deterministic. Only what the plan reads is modelled; every write goes through `World.step`, which can stop after any of
them as a killed operator would.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from rlhf_gateway.wire import CONFIG_KEY, ArmCounts, DataPlaneState, Evidence, GatewayConfig
from rlhf_operator.api.labels import COMPONENT, OWNER_UID, REVISION
from rlhf_operator.kinds.base import Key, Observed, Plan, Pulled, Settings
from rlhf_operator.kinds.policy_rollout import SPEC
from rlhf_operator.kinds.policy_rollout.observe import SERVICE_NAME

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
FILTER = {"uri": "pvc://feedback/filter.json", "digest": "sha256:" + "f" * 64}
START = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
BOUNDS = (10.0, 20.0, 50.0, 100.0, 200.0)

STAGES = [
    {"weightPercent": 0, "shadow": True, "minSamples": 50},
    {"weightPercent": 10, "minSamples": 50, "minDuration": "30s"},
    {"weightPercent": 50, "minSamples": 200},
]
GUARDRAILS = [
    {"metric": "safetyViolationRate", "margin": 0.02},
    {"metric": "availability", "margin": 0.02},
    {"metric": "latencyP95", "margin": 0.05},
]


def source(digest: str) -> dict[str, str]:
    return {"uri": f"pvc://models/{digest[7:10]}", "digest": digest}


def rollout(**spec: Any) -> dict[str, Any]:
    base = {"policy": source(A), "safetyFilter": FILTER, "stages": STAGES, "guardrails": GUARDRAILS}
    return {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "PolicyRollout",
        "metadata": {"name": "desk", "namespace": "team", "uid": "uid-1", "generation": 1},
        "spec": copy.deepcopy({**base, **spec}),
    }


class Gateway:
    """One gateway pod: it follows the ConfigMap, splits by weight, and counts."""

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.epoch = f"{uid}-e0"
        self.config: GatewayConfig | None = None
        self.rows: dict[tuple[int, str, str, bool], dict[str, Any]] = {}
        self.in_flight: dict[str, int] = {}
        self.reachable = True
        self.errors: tuple[str, ...] = ()  # it then has no filter

    def restart(self) -> None:
        number = int(self.epoch.rsplit("e", 1)[1]) + 1
        self.epoch, self.rows = f"{self.uid}-e{number}", {}

    def count(self, arm: str, revision: str, *, bad: bool, failed: bool, bucket: int, judged: bool = True) -> None:
        assert self.config is not None
        key = (self.config.stage, arm, revision, self.config.shadow and arm == "canary")
        row = self.rows.setdefault(key, {"n": 0, "failed": 0, "judged": 0, "bad": 0, "buckets": [0] * 6})
        row["n"] += 1
        row["failed"] += failed
        row["judged"] += judged and not failed
        row["bad"] += bad and judged and not failed
        if not failed:
            row["buckets"][bucket] += 1

    def evidence(self) -> dict[str, Any]:
        counts = tuple(
            ArmCounts(
                stage=stage,
                arm=arm,
                revision=revision,
                shadow=shadow,
                requests=row["n"],
                conversations=row["n"],
                failed_conversations=row["failed"],
                judged_conversations=row["judged"],
                violating_conversations=row["bad"],
                latency_conversation_buckets=tuple(row["buckets"]),
            )
            for (stage, arm, revision, shadow), row in self.rows.items()
        )
        body = Evidence(
            pod_uid=self.uid,
            epoch=self.epoch,
            generation=self.generation,
            latency_bounds_ms=BOUNDS,
            counts=counts,
        )
        return json.loads(body.to_json())

    @property
    def generation(self) -> int:
        return self.config.generation if self.config is not None else -1

    def state(self) -> dict[str, Any]:
        body = DataPlaneState(
            pod_uid=self.uid,
            epoch=self.epoch,
            generation=self.generation,
            canary_weight_percent=self.config.canary_weight_percent if self.config else 0.0,
            in_flight=self.in_flight,
            errors=self.errors,
        )
        return json.loads(body.to_json())


class World:
    def __init__(self, seed: int = 0, **spec: Any) -> None:
        self.primary = rollout(**spec)
        self.children: dict[tuple[str, str], dict[str, Any]] = {}
        self.related: dict[Key, Any] = {}
        self.decisions: list[dict[str, Any]] = []
        self.honoured = True
        self.gateways: dict[str, Gateway] = {}
        self.broken: set[str] = set()  # revisions whose pods do not get ready
        self.crashing: set[str] = set()
        self.unchecked: set[str] = set()  # revisions whose init container refuses what it is to check
        self.restarts: dict[str, int] = {}  # of pods that are well now
        self.leaving: set[str] = set()  # revisions whose pods are told to go, by a drained node or a new template
        self.follow = True  # gateways take up new configurations
        self.now = START
        self.writes: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.plan: Plan | None = None
        self.rng = random.Random(seed)
        self._pulled: dict[str, Pulled] = {}
        self.weights_seen: list[float] = []

    # What the operator does

    def observed(self) -> Observed:
        kinds = [r.kind for r in (*SPEC.children, *SPEC.observed_only)]
        return Observed(
            primary=copy.deepcopy(self.primary),
            children={
                k: tuple(copy.deepcopy(o) for (kind, _), o in sorted(self.children.items()) if kind == k) for k in kinds
            },
            related=self.related,
            decisions=tuple(self.decisions) if self.honoured else (),
            decisions_honoured=self.honoured,
            pulled=dict(self._pulled),
            now=self.now,
            settings=Settings(trainer_image="trainer:1", gateway_image="operator:1"),
        )

    def step(self, stop_after: int | None = None) -> int:
        """One pass; killed after `stop_after` writes. Returns the number of writes."""
        self.plan = SPEC.plan(self.observed())
        done = 0
        for write in self._writes(self.plan):
            if stop_after is not None and done >= stop_after:
                return done
            self.writes.append(write())
            done += 1
        return done

    def _writes(self, plan: Plan) -> Iterator[Any]:
        if plan.status_first and self._status_differs(plan):
            yield lambda: self._write_status(plan)
        for ref in plan.delete:
            if (ref.resource.kind, ref.name) in self.children:
                yield lambda ref=ref: self._delete(ref.resource.kind, ref.name)
        for child in plan.apply:
            if not _subset(child, self.children.get((child["kind"], child["metadata"]["name"]))):
                yield lambda child=child: self._apply(child)
        if self._status_differs(plan):
            yield lambda: self._write_status(plan)

    def _status_differs(self, plan: Plan) -> bool:
        return json.loads(json.dumps(plan.status)) != self.primary.get("status")

    def _write_status(self, plan: Plan) -> str:
        self.primary["status"] = json.loads(json.dumps(plan.status))
        self.events += [(event.reason, event.message) for event in plan.events]
        return "status"

    def _delete(self, kind: str, name: str) -> str:
        del self.children[kind, name]
        return f"delete {kind} {name}"

    def _apply(self, child: Any) -> str:
        kind, name = child["kind"], child["metadata"]["name"]
        body = copy.deepcopy(dict(child))
        body["metadata"]["uid"] = f"{kind}-{name}"
        self.children[kind, name] = body
        return f"apply {kind} {name}"

    # What the cluster does

    def kubelet(self) -> None:
        for kind, name in [key for key in self.children if key[0] in ("Pod", "EndpointSlice")]:
            del self.children[kind, name]
        for (kind, name), child in list(self.children.items()):
            if kind == "Deployment":
                self._pods(name, child)
        for (kind, name), child in list(self.children.items()):
            if kind == "Service" and child["metadata"]["labels"][COMPONENT] == "policy-server":
                self._endpoints(name)
        live = {o["metadata"]["uid"] for (kind, _), o in self.children.items() if kind == "Pod"}
        self.gateways = {uid: gateway for uid, gateway in self.gateways.items() if uid in live}
        if self.follow:
            self.gateways_follow()

    def _pods(self, name: str, deployment: dict[str, Any]) -> None:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert labels[OWNER_UID] == "uid-1"
        for index in range(deployment["spec"]["replicas"]):
            uid = f"{name}-{index}"
            bad = name in self.broken | self.crashing | self.unchecked | self.leaving
            status: dict[str, Any] = {
                "phase": "Running",
                "podIP": f"10.0.0.{index + 1}",
                "conditions": [
                    {
                        "type": "Ready",
                        "status": "False" if bad else "True",
                        "lastTransitionTime": "2026-11-23T12:00:00Z",
                    }
                ],
            }
            if name in self.crashing:
                waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
                status["containerStatuses"] = [{"name": "policy-server", "restartCount": 2, "state": waiting}]
            elif name in self.unchecked:
                looping = {"waiting": {"reason": "CrashLoopBackOff"}}
                ended = {"terminated": {"reason": "Error", "exitCode": 11}}
                refused = {"name": "verify", "restartCount": 2, "state": looping, "lastState": ended}
                status |= {"phase": "Pending", "initContainerStatuses": [refused]}
            elif name in self.restarts:
                count = self.restarts[name]
                status["containerStatuses"] = [{"name": "policy-server", "restartCount": count, "ready": not bad}]
            self.children["Pod", uid] = {
                "kind": "Pod",
                "metadata": {"name": uid, "uid": uid, "namespace": "team", "labels": labels},
                "status": status,
            }
            if name in self.leaving:
                self.children["Pod", uid]["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
            if labels[COMPONENT] == "gateway":
                self.gateways.setdefault(uid, Gateway(uid))

    def _endpoints(self, name: str) -> None:
        pods = [
            pod
            for (kind, _), pod in self.children.items()
            if kind == "Pod" and pod["metadata"]["labels"].get(REVISION) == name
        ]
        ready = [pod for pod in pods if pod["status"]["conditions"][0]["status"] == "True"]
        self.children["EndpointSlice", name] = {
            "kind": "EndpointSlice",
            "metadata": {"name": name, "uid": f"slice-{name}", "labels": {SERVICE_NAME: name}},
            "endpoints": [{"addresses": [pod["status"]["podIP"]], "conditions": {"ready": True}} for pod in ready],
        }

    def gateways_follow(self) -> None:
        config_map = self.children.get(("ConfigMap", "desk-gateway"))
        if config_map is not None:
            config = GatewayConfig.model_validate_json(config_map["data"][CONFIG_KEY])
            self.weights_seen.append(config.canary_weight_percent)
            for gateway in self.gateways.values():
                gateway.config = config

    def pull(self) -> None:
        """Every pull that the last plan wanted is answered."""
        wanted = {pull.key for pull in (self.plan.pulls if self.plan else ())}
        self._pulled = {key: value for key, value in self._pulled.items() if key in wanted}
        for uid, gateway in self.gateways.items():
            for key, body in ((f"evidence/{uid}", gateway.evidence), (f"state/{uid}", gateway.state)):
                if key not in wanted:
                    continue
                before = self._pulled.get(key, Pulled(None, None, None, None))
                self._pulled[key] = (
                    Pulled(body(), self.now, None, None)
                    if gateway.reachable
                    else Pulled(before.body, before.at, "no route to host", before.failing_since or self.now)
                )

    def traffic(self, conversations: int, *, canary_bad: float = 0.0, stable_bad: float = 0.0, **kind: float) -> None:
        """Conversations spread over the gateway pods. kind: canary_failed, stable_failed, canary_slow (shares)."""
        pods = list(self.gateways.values())
        for number in range(conversations):
            gateway = pods[number % len(pods)]
            config = gateway.config
            assert config is not None
            assert config.stable is not None
            canary = config.canary is not None and self.rng.random() * 100 < config.canary_weight_percent
            arms = ["canary"] if canary else ["stable"]
            if config.shadow and config.canary is not None:
                arms = ["stable", "canary"]
            for arm in arms:
                backend = config.canary if arm == "canary" else config.stable
                assert backend is not None
                slow = self.rng.random() < (kind.get("canary_slow", 0.04) if arm == "canary" else 0.04)
                gateway.count(
                    arm,
                    backend.revision,
                    bad=self.rng.random() < (canary_bad if arm == "canary" else stable_bad),
                    failed=self.rng.random() < kind.get(f"{arm}_failed", 0.0),
                    bucket=3 if slow else 1,
                    judged=config.safety_filter is not None and not gateway.errors,
                )

    # Everything together

    def settle(self, passes: int = 30) -> None:
        """Until a pass writes nothing and the cluster changes nothing. Time stands still."""
        for _ in range(passes):
            wrote = self.step()
            self.kubelet()
            self.pull()
            if not wrote and not self.step():
                return
        raise AssertionError(f"the plan does not come to rest: {self.writes[-6:]}")

    def run(self, seconds: int, per_second: int = 20, **kind: float) -> None:
        for _ in range(seconds):
            self._second(per_second, **kind)
        self.settle()

    def _second(self, per_second: int, **kind: float) -> None:
        self.now += timedelta(seconds=1)
        if per_second:
            self.traffic(per_second, **kind)
        self.pull()
        self.step()
        self.kubelet()

    def until(self, phase: str, limit: int = 600, **kind: float) -> None:
        """Seconds of traffic until a phase is reached."""
        for _ in range(limit):
            if self.status["phase"] == phase:
                return self.settle()
            self._second(20, **kind)
        raise AssertionError(f"{phase} not reached: {self.status['phase']}, {self.condition('Progressing')}")

    def spec(self, **changes: Any) -> None:
        self.primary["spec"].update(copy.deepcopy(changes))
        self.primary["metadata"]["generation"] += 1

    def decide(self, action: str, digest: str, *, stage: int | None = None, by: str = "ada", **more: Any) -> None:
        spec = {"subject": {"kind": "PolicyRollout", "name": "desk"}, "action": action, "digest": digest, "by": by}
        spec |= {"reason": "looked at it", **({"stage": stage} if stage is not None else {}), **more}
        stamp = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"d{len(self.decisions)}"
        self.decisions.append({"metadata": {"name": name, "creationTimestamp": stamp}, "spec": spec})

    @property
    def status(self) -> dict[str, Any]:
        return self.primary.get("status") or {}

    @property
    def config(self) -> GatewayConfig:
        return GatewayConfig.model_validate_json(self.children["ConfigMap", "desk-gateway"]["data"][CONFIG_KEY])

    def condition(self, type: str) -> dict[str, Any]:
        found = [c for c in self.status["conditions"] if c["type"] == type]
        return found[0] if found else {}

    def entry(self, digest: str) -> dict[str, Any]:
        return [entry for entry in self.status["revisions"] if entry["digest"] == digest][-1]

    def serving(self) -> World:
        """With policy A as the first stable revision."""
        self.settle()
        assert self.status["phase"] == "Healthy"
        return self


def _subset(desired: Any, live: Any) -> bool:
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(_subset(value, live.get(key)) for key, value in desired.items())
    return bool(desired == live)


A_NAME, B_NAME, C_NAME = (f"desk-{letter * 10}" for letter in "abc")
SAFETY_ONLY = [{"metric": "safetyViolationRate", "margin": 0.05}]


def trying(digest: str = B, **spec: Any) -> World:
    """A world with A stable and another policy as the candidate in its first stage."""
    world = World(**spec).serving()
    world.spec(policy=source(digest))
    world.settle()
    return world


def names(world: World, kind: str) -> set[str]:
    return {name for found, name in world.children if found == kind}
