"""What the Job controller and the kubelet do with training Jobs, as far as their status shows it.

Pure functions of a Job and its pods: used on the API in memory and, by benchmarks, on a real API server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rlhf_operator.kinds.training.claims import claims_named

Dict = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
DIGEST = "sha256:" + "d" * 64


def claims_for(job: Mapping[str, Any], *modes: str) -> list[Dict]:
    """The PersistentVolumeClaims that a job names, for any number of nodes unless `modes` says otherwise."""
    return [claim(key.namespace, key.name, *modes) for key in sorted(claims_named(job))]


def claim(namespace: str, name: str, *modes: str) -> Dict:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "accessModes": list(modes or ("ReadWriteMany",)),
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def pods_of(job: Mapping[str, Any], template: Mapping[str, Any]) -> list[Dict]:
    """The pods that the Job controller would make."""
    meta, spec = job["metadata"], job["spec"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{meta['name']}-{index}",
                "namespace": meta["namespace"],
                "labels": {**template["metadata"]["labels"], INDEX: str(index)},
                "ownerReferences": [owner],
            },
            "spec": {
                "restartPolicy": "Never",
                "containers": [{"name": c["name"], "image": "none"} for c in template["spec"]["containers"]],
            },
        }
        for index in range(spec.get("completions") or 1)
    ]


def running(now: datetime) -> Dict:
    conditions = [{"type": t, "status": "True", "lastTransitionTime": _time(now)} for t in ("PodScheduled", "Ready")]
    return {"phase": "Running", "conditions": conditions}


def ended(pod: Mapping[str, Any], code: int, message: str, now: datetime) -> Dict:
    (container, *_) = pod["spec"]["containers"]
    reason = "Error" if code else "Completed"
    state = {"exitCode": code, "reason": reason, "message": message, "startedAt": _time(now), "finishedAt": _time(now)}
    status = {
        "name": container["name"],
        "image": "none",
        "imageID": "none",
        "ready": False,
        "restartCount": 0,
        "state": {"terminated": state},
    }
    return {"phase": "Failed" if code else "Succeeded", "containerStatuses": [status]}


def job_ended(job: Mapping[str, Any], failed: bool, now: datetime) -> Dict:
    """A Job's final status, as the API server accepts it."""
    moment = _time(now)
    kinds = ("FailureTarget", "Failed") if failed else ("SuccessCriteriaMet", "Complete")
    conditions = [
        {"type": k, "status": "True", "reason": "Test", "lastTransitionTime": moment, "lastProbeTime": moment}
        for k in kinds
    ]
    count = job["spec"].get("completions") or 1
    status: Dict = {"startTime": moment, "conditions": conditions}
    if failed:
        return status | {"failed": count}
    status |= {"completionTime": moment, "succeeded": count}
    if job["spec"].get("completionMode") == "Indexed":
        status["completedIndexes"] = "0" if count == 1 else f"0-{count - 1}"
    return status


def success(uid: str, attempt: int, now: datetime) -> str:
    """The termination message of a run that made an artifact."""
    return _result(
        "Success",
        0,
        uid,
        attempt,
        now,
        artifact={"path": f"/mnt/rlhf/out/artifacts/{uid}/a{attempt}/artifact", "digest": DIGEST},
        verdicts=[{"metric": "accuracy", "state": "Pass", "n": 500}],
    )


def failure(uid: str, attempt: int, now: datetime) -> str:
    """The termination message of a run worth another attempt."""
    return _result("Rendezvous", 21, uid, attempt, now)


def _result(failure_class: str, code: int, uid: str, attempt: int, now: datetime, **more: Any) -> str:
    return json.dumps(
        {
            "failureClass": failure_class,
            "reason": failure_class,
            "message": f"it ended as {failure_class}",
            "exitCode": code,
            "attempt": attempt,
            "uid": uid,
            "finishedAt": _time(now),
            **more,
        }
    )


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def by_owner(pods: Sequence[Mapping[str, Any]], job: Mapping[str, Any]) -> list[Any]:
    uid = job["metadata"]["uid"]
    return [p for p in pods if any(o["uid"] == uid for o in p["metadata"].get("ownerReferences") or ())]
