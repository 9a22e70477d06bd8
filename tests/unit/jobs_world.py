"""A cluster small enough to read: it executes plans, plays Job controller and kubelet, and has a clock of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rlhf_operator.api.labels import ATTEMPT, COMPONENT, OWNER_UID
from rlhf_operator.kinds.base import Event, Key, Observed, Plan, Prices, Pulled, Settings
from rlhf_operator.kinds.policy_optimization_job.plan import plan as plan_policy
from rlhf_operator.kinds.reward_model_job.plan import plan as plan_reward
from tests.property import cluster

START = datetime(2026, 1, 1, tzinfo=UTC)
UID = "11111111-2222-3333-4444-555555555555"
OUT = f"/mnt/rlhf/out/artifacts/rm/{UID}"


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def rfc3339(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def reward_spec(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "baseModel": {"uri": "pvc://models/sft", "digest": digest("a")},
        "preferences": {"uri": "pvc://feedback/desk.jsonl", "digest": digest("b")},
        "output": {"uri": "pvc://artifacts/rm"},
        "trainer": {"numNodes": 2},
    }
    return spec | changes


def stored_spec(**changes: Any) -> dict[str, Any]:
    """A reward model whose inputs are in an object store."""
    spec: dict[str, Any] = {
        "baseModel": {"uri": "s3://models/desk/sft", "digest": digest("a")},
        "preferences": {"uri": "s3://feedback/desk.jsonl", "digest": digest("b")},
        "objectStore": {"endpoint": "https://minio.storage.svc:9000", "secretRef": {"name": "desk-store"}},
    }
    return reward_spec(**spec | changes)


def policy_spec(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "policy": {"uri": "pvc://models/sft", "digest": digest("a")},
        "rewardModel": {"jobRef": {"name": "rm"}},
        "prompts": {"uri": "pvc://feedback/prompts.jsonl", "digest": digest("c")},
        "output": {"uri": "pvc://artifacts/rm"},
        "trainer": {"numNodes": 2},
    }
    return spec | changes


def _texts(name: str, letter: str) -> dict[str, str]:
    return {"uri": f"pvc://feedback/{name}.jsonl", "digest": digest(letter)}


_ONLINE = {"rewardModel": {"jobRef": {"name": "rm"}}}
# What a policy_spec needs besides, by algorithm.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "PPO": _ONLINE,
    "GRPO": {**_ONLINE, "training": {"algorithm": "GRPO", "samplesPerPrompt": 4}},
    "RLOO": {**_ONLINE, "training": {"algorithm": "RLOO", "samplesPerPrompt": 4}},
    "ReinforcePlusPlus": {**_ONLINE, "training": {"algorithm": "ReinforcePlusPlus"}},
    "BestOfN": {**_ONLINE, "training": {"algorithm": "BestOfN", "samplesPerPrompt": 8}},
    "DPO": {"preferences": _texts("pairs", "1"), "training": {"algorithm": "DPO"}},
    "KTO": {"preferences": _texts("thumbs", "2"), "training": {"algorithm": "KTO"}},
    "SFT": {"demonstrations": _texts("demonstrations", "3"), "training": {"algorithm": "SFT"}},
    "Distillation": {"teacher": {"jobRef": {"name": "teacher"}}, "training": {"algorithm": "Distillation"}},
}


def algorithm_spec(algorithm: str, **changes: Any) -> dict[str, Any]:
    """The least that this algorithm runs with."""
    spec = policy_spec(**ALGORITHMS[algorithm])
    if "rewardModel" not in ALGORITHMS[algorithm]:
        del spec["rewardModel"]
    return spec | changes


def result(failure_class: str = "Success", exit_code: int = 0, **changes: Any) -> str:
    body: dict[str, Any] = {
        "failureClass": failure_class,
        "reason": failure_class,
        "message": f"it ended as {failure_class}",
        "exitCode": exit_code,
        "attempt": 1,
        "uid": UID,
        "finishedAt": "now",  # World.exit knows when that is
    }
    return json.dumps(body | changes)


def success(attempt: int = 1, letter: str = "d", **changes: Any) -> str:
    artifact = {"path": f"{OUT}/a{attempt}/artifact", "digest": digest(letter)}
    verdicts = [{"metric": "accuracy", "state": "Pass", "n": 500, "estimate": 0.8, "lower": 0.76, "upper": 0.84}]
    return result(**{"attempt": attempt, "artifact": artifact, "verdicts": verdicts} | changes)


class World:
    """One job and its children. `tick` plans and executes until nothing is asked for any more."""

    def __init__(
        self,
        spec: Mapping[str, Any] | None = None,
        kind: str = "RewardModelJob",
        settings: Settings | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.now = START
        self.plan: Callable[[Observed], Plan] = plan_reward if kind == "RewardModelJob" else plan_policy
        self.primary: dict[str, Any] = {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": kind,
            "metadata": {
                "name": "rm",
                "namespace": "ml",
                "uid": UID,
                "generation": 1,
                "creationTimestamp": rfc3339(START),
                "labels": dict(labels or {}),
            },
            "spec": dict(spec if spec is not None else reward_spec()),
        }
        self.settings = settings or Settings(trainer_image="rlhf-trainer:dev", gateway_image="rlhf-operator:dev")
        self.children: dict[str, dict[str, dict[str, Any]]] = {"Job": {}, "Service": {}, "ConfigMap": {}, "Pod": {}}
        self.related: dict[Key, dict[str, Any] | None] = {}
        self.decisions: list[dict[str, Any]] = []
        self.reports: dict[str, Any] = {}
        self.events: list[Event] = []
        self.log: list[str] = []  # writes in their order
        self._uids = 0

    # The operator's side.

    @property
    def status(self) -> dict[str, Any]:
        return self.primary.get("status", {})

    def observed(self, plan: Plan | None = None) -> Observed:
        pulls = plan.pulls if plan else ()
        pulled = {
            pull.key: Pulled(body=self.reports["body"], at=self.reports["at"], error=None, failing_since=None)
            for pull in pulls
            if self.reports
        }
        return Observed(
            primary=copy.deepcopy(self.primary),
            children={kind: tuple(copy.deepcopy(list(objects.values()))) for kind, objects in self.children.items()},
            related={**self._claims(), **self.related},
            decisions=tuple(self.decisions),
            decisions_honoured=True,
            pulled=pulled,
            now=self.now,
            settings=self.settings,
        )

    def _claims(self) -> dict[Key, dict[str, Any]]:
        """Whatever the job names exists and can be shared, unless `related` says otherwise."""
        claims = cluster.claims_for(self.primary)
        return {Key(c["kind"], c["metadata"]["namespace"], c["metadata"]["name"]): c for c in claims}

    def once(self) -> Plan:
        """One pass, executed as the engine does; `log` gets what it wrote."""
        first = self.plan(self.observed())
        plan = self.plan(self.observed(first)) if first.pulls and self.reports else first
        assert plan.status_first
        if dict(plan.status) != self.status:
            self.primary["status"] = json.loads(json.dumps(plan.status))
            self.log.append("status")
            self.events += plan.events
        for ref in plan.delete:
            child = self.children[ref.resource.kind].get(ref.name)
            if child is not None and child["metadata"]["uid"] == ref.uid:
                self.log.append(f"delete {ref.resource.kind} {ref.name}")
                self._delete(ref.resource.kind, ref.name)
        for body in plan.create:
            name = body["metadata"]["name"]
            assert name not in self.children[body["kind"]], f"{body['kind']} {name} is there already"
            self.log.append(f"create {body['kind']} {name}")
            self._create(body)
        return plan

    def tick(self, seconds: float = 0.0) -> Plan:
        self.now += timedelta(seconds=seconds)
        for _ in range(12):
            before = len(self.log)
            plan = self.once()
            if len(self.log) == before:
                return plan
        raise AssertionError(f"the plan does not come to rest: {self.log[-12:]}")

    def wait(self) -> Plan:
        """To the moment the plan asked for."""
        plan = self.tick()
        assert plan.requeue_after is not None, "the plan waits for nothing"
        return self.tick(plan.requeue_after)

    # The cluster's side.

    def _create(self, body: Mapping[str, Any]) -> None:
        self._uids += 1
        live = json.loads(json.dumps(body))
        live["metadata"] |= {
            "uid": f"child-{self._uids}",
            "creationTimestamp": rfc3339(self.now),
            "ownerReferences": [{"kind": self.primary["kind"], "name": "rm", "uid": UID, "controller": True}],
        }
        self.children[body["kind"]][body["metadata"]["name"]] = live
        if body["kind"] == "Job" and not body["spec"].get("suspend"):
            self._start_pods(live)

    def _delete(self, kind: str, name: str) -> None:
        del self.children[kind][name]
        if kind == "Job":
            for pod in [*self.children["Pod"].values()]:
                if pod["metadata"]["ownerJob"] == name:
                    self.terminate(pod["metadata"]["name"])

    def _start_pods(self, job: Mapping[str, Any]) -> None:
        name = job["metadata"]["name"]
        labels = job["spec"]["template"]["metadata"]["labels"]
        for index in range(job["spec"].get("completions", 1)):
            self._uids += 1
            self.children["Pod"][f"{name}-{index}-{self._uids}"] = {
                "metadata": {
                    "name": f"{name}-{index}-{self._uids}",
                    "namespace": "ml",
                    "uid": f"pod-{self._uids}",
                    "labels": labels | {"batch.kubernetes.io/job-completion-index": str(index)},
                    "creationTimestamp": rfc3339(self.now),
                    "ownerJob": name,
                },
                "spec": {"nodeName": "node"},
                "status": {"phase": "Pending", "podIP": f"10.0.0.{index + 1}"},
            }

    @property
    def job(self) -> dict[str, Any]:
        """The only trainer Job."""
        [job] = [j for j in self.children["Job"].values() if j["metadata"]["labels"][COMPONENT] == "trainer"]
        return job

    def pods(self, attempt: int | None = None, component: str = "trainer") -> list[dict[str, Any]]:
        return [
            pod
            for pod in self.children["Pod"].values()
            if pod["metadata"]["labels"][COMPONENT] == component
            and attempt in (None, int(pod["metadata"]["labels"][ATTEMPT]))
        ]

    def run_pods(self) -> None:
        """All pods of the newest attempt are scheduled, started and ready."""
        for pod in self.pods():
            self.mark(pod, "PodScheduled", "Ready")
            pod["status"]["phase"] = "Running"
        self.tick()

    def mark(self, pod: dict[str, Any], *types: str, status: str = "True", reason: str = "", message: str = "") -> None:
        conditions = pod["status"].setdefault("conditions", [])
        entry = {"status": status, "reason": reason, "message": message, "lastTransitionTime": rfc3339(self.now)}
        for type in types:
            conditions[:] = [*(c for c in conditions if c["type"] != type), {"type": type, **entry}]

    def exit(
        self, index: int, code: int, message: str = "", reason: str = "Error", after: float = 0.0
    ) -> dict[str, Any]:
        """The trainer container of one pod ends."""
        self.now += timedelta(seconds=after)
        pod = self.pods()[index]
        message = message.replace('"now"', f'"{rfc3339(self.now)}"')
        state = {"exitCode": code, "reason": reason, "message": message, "finishedAt": rfc3339(self.now)}
        pod["status"]["containerStatuses"] = [{"name": "trainer", "state": {"terminated": state}}]
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        return pod

    def request_deletion(self, pod: dict[str, Any], grace: int = 120) -> None:
        pod["metadata"]["deletionTimestamp"] = rfc3339(self.now + timedelta(seconds=grace))
        pod["metadata"]["deletionGracePeriodSeconds"] = grace

    def terminate(self, name: str) -> None:
        """The pod is deleted, ends with SIGTERM's class, and is gone."""
        self.children["Pod"].pop(name)

    def finish_job(self, type: str) -> None:
        self.job["status"] = {"conditions": [self._condition(type)]}

    def _condition(self, type: str) -> dict[str, str]:
        return {"type": type, "status": "True", "lastTransitionTime": rfc3339(self.now)}

    def fail(self, code: int, message: str = "", reason: str = "Error", **pod_changes: Any) -> None:
        """Index 1 fails, the Job controller ends the other pod, the Job fails."""
        pod = self.exit(1, code, message, reason)
        pod["status"] |= pod_changes
        for other in self.pods():
            if other is not pod:
                self.request_deletion(other)
        self.exit(0, 20, result("Preempted", 20), after=2)
        self.finish_job("Failed")
        self.tick()

    def complete(self, message: str | None = None) -> None:
        for index in range(len(self.pods())):
            self.exit(index, 0, (message or success(self.status["attempt"])) if index == 0 else "", "Completed")
        self.finish_job("Complete")
        self.tick()

    def report(self, step: int = 1, world_size: int = 2, **changes: Any) -> None:
        """Rank 0 answers a pull."""
        body: dict[str, Any] = {
            "attempt": self.status["attempt"],
            "uid": UID,
            "worldSize": world_size,
            "phase": "Training",
            "step": step,
            "totalSteps": 100,
            "startedAt": rfc3339(START),
            "updatedAt": rfc3339(self.now),
        }
        self.reports = {"body": body | changes, "at": self.now}
        self.tick()

    def decide(self, action: str, **fields: Any) -> None:
        subject = {"kind": self.primary["kind"], "name": "rm"}
        spec = {"subject": subject, "action": action, "by": "ada", "reason": "looked at it", **fields}
        metadata = {"name": f"decision-{len(self.decisions)}", "creationTimestamp": rfc3339(self.now)}
        self.decisions.append({"metadata": metadata, "spec": spec})
        self.tick()

    def edit(self, **spec: Any) -> None:
        self.primary["spec"] |= spec
        self.primary["metadata"]["generation"] += 1
        self.tick()

    def upstream(
        self, name: str = "rm", letter: str = "e", validated: bool = True, kind: str = "RewardModelJob", **status: Any
    ) -> None:
        self.related[Key(kind, "ml", name)] = {
            "metadata": {"name": name, "namespace": "ml", "uid": f"uid-{name}"},
            "status": {
                "phase": "Succeeded",
                "conditions": [{"type": "Validated", "status": "True" if validated else "False"}],
                "artifact": {"uri": f"pvc://artifacts/{name}/a1/artifact", "digest": digest(letter)},
                **status,
            },
        }

    # What tests ask.

    @property
    def phase(self) -> str:
        return str(self.status.get("phase"))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return list(self.status.get("attempts", []))

    @property
    def last(self) -> dict[str, Any]:
        return self.attempts[-1]

    def condition(self, type: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions", []) if c["type"] == type), {})

    def holds(self, type: str) -> tuple[str, str]:
        found = self.condition(type)
        return found.get("status", ""), found.get("reason", "")

    def told(self, reason: str) -> list[str]:
        return [event.message for event in self.events if event.reason == reason]


def priced(**per_hour: float) -> Settings:
    settings = Settings(trainer_image="rlhf-trainer:dev", gateway_image="rlhf-operator:dev")
    return replace(
        settings, prices=Prices(per_hour={k.replace("gpu", "nvidia.com/gpu"): v for k, v in per_hour.items()})
    )


def owned_by_nobody(world: World, attempt: int) -> dict[str, Any]:
    """A pod of this job, left over by an attempt."""
    labels = {OWNER_UID: UID, ATTEMPT: str(attempt), COMPONENT: "trainer"}
    metadata = {"name": f"left-{attempt}", "uid": f"left-{attempt}", "labels": labels, "ownerJob": "gone"}
    pod = {"metadata": metadata, "status": {"phase": "Succeeded"}}
    world.children["Pod"][metadata["name"]] = pod
    return pod


def started(spec: dict[str, Any] | None = None, **options: Any) -> World:
    world = World(spec, **options)
    world.tick()
    return world


def training(spec: dict[str, Any] | None = None, **options: Any) -> World:
    world = started(spec, **options)
    world.run_pods()
    world.report()
    return world
