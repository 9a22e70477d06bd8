"""The children of one attempt: an Indexed Job, a headless Service and a ConfigMap, and the reporter Job.

All are created once and never changed: a change means a new attempt, and Kueue edits Jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.api.labels import (
    ATTEMPT,
    COMPONENT,
    FIELD_MANAGER,
    MANAGED_BY,
    OWNER_KIND,
    OWNER_NAME,
    OWNER_UID,
)
from rlhf_operator.api.training import TrainerSpec
from rlhf_operator.kinds.base import Object
from rlhf_operator.kinds.training.environment import environment
from rlhf_operator.kinds.training.job import Input, Job
from rlhf_operator.kinds.training.merge import merge
from rlhf_operator.kinds.training.objects import integer, mapping, mappings
from rlhf_operator.kinds.training.pods import INDEX_LABEL
from rlhf_operator.kinds.training.resources import Shape, shape
from rlhf_operator.kinds.training.storage import OUT_ROOT, Volume, input_path, mounts, place_of
from rlhf_trainer.wire import ATTEMPT_CONFIG_PATH, RENDEZVOUS_PORT, STATUS_PORT, AttemptConfig, digest_of

TRAINER, REPORTER = "trainer", "reporter"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_KUEUE_PREFIX = "kueue.x-k8s.io/"
_USER = 65532
_GRACE_SECONDS = 120  # to save a checkpoint after SIGTERM
_REPORT_SECONDS = 300
# Of a podTemplate: without them the reporter may not get its image, a node that reaches the volume, or the files.
_REACH = ("imagePullSecrets", "serviceAccountName", "nodeSelector", "affinity", "tolerations", "securityContext")


def output_of(job: Job[Any]) -> Volume:
    """The folder of this run; an attempt writes only into its own part of it."""
    return Volume.parse(job.spec.output.uri).joined(job.uid)


def config_digest(job: Job[Any], inputs: Mapping[str, Input]) -> str:
    """Equal for all attempts of a run: a checkpoint of another configuration is not resumed from."""
    digests = {name: inputs[name].digest for name in job.kind.identity_inputs if name in inputs}
    # Without defaults: an operator that knows more fields must not orphan the checkpoints of a run in progress.
    training = job.kind.training(job.spec).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return digest_of({"kind": job.kind.kind, "inputs": digests, "training": training})


def attempt_config(job: Job[Any], number: int, inputs: Mapping[str, Input], size: Shape) -> AttemptConfig:
    """Everything the pods need, resolved to paths in the pod."""
    output = output_of(job)
    grace = integer(template(job, number, inputs), "spec", "terminationGracePeriodSeconds")
    located = {
        name: {"path": input_path(name, found.uri), "digest": found.digest, "uri": found.uri}
        for name, found in inputs.items()
    }
    return AttemptConfig.model_validate(
        {
            "kind": job.kind.kind,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
            "attempt": number,
            "worldSize": size.world_size,
            "configDigest": config_digest(job, inputs),
            "output": {"path": output.at(OUT_ROOT), "uri": output.uri},
            "checkpoints": job.spec.checkpoints,
            "noProgressSeconds": job.spec.failure_policy.no_progress_seconds,
            "rendezvousSeconds": job.spec.failure_policy.rendezvous_seconds,
            "graceSeconds": _GRACE_SECONDS if grace is None else grace,
            **job.kind.attempt_fields(job.spec),
            **located,
        }
    )


def of_attempt(job: Job[Any], number: int, inputs: Mapping[str, Input], size: Shape) -> tuple[Object, ...]:
    """ConfigMap, Service and Job, in the order in which they are created: pods find what they need."""
    config = attempt_config(job, number, inputs, size)
    return _config_map(job, number, config), _service(job, number), _job(job, number, inputs, size)


def _metadata(job: Job[Any], name: str, number: int, component: str) -> dict[str, Any]:
    return {"name": name, "namespace": job.namespace, "labels": _labels(job, number, component)}


def _labels(job: Job[Any], number: int, component: str) -> dict[str, str]:
    return {
        MANAGED_BY: FIELD_MANAGER,
        OWNER_KIND: job.kind.kind,
        OWNER_NAME: job.name,
        OWNER_UID: job.uid,
        ATTEMPT: str(number),
        COMPONENT: component,
    }


def _config_map(job: Job[Any], number: int, config: AttemptConfig) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, job.attempt_name(number), number, TRAINER),
        "immutable": True,
        "data": {"attempt.json": config.to_json()},
    }


def _service(job: Job[Any], number: int) -> Object:
    """Headless; it publishes pods before they are ready: they must find each other to become so."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, job.attempt_name(number), number, TRAINER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _labels(job, number, TRAINER),
            "ports": [
                {"name": "status", "port": STATUS_PORT},
                {"name": "rendezvous", "port": RENDEZVOUS_PORT},
            ],
        },
    }


def _job(job: Job[Any], number: int, inputs: Mapping[str, Input], size: Shape) -> Object:
    metadata = _metadata(job, job.attempt_name(number), number, TRAINER)
    kueue = {name: value for name, value in job.labels.items() if name.startswith(_KUEUE_PREFIX)}
    metadata["labels"] |= {name: value for name, value in kueue.items() if isinstance(value, str)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": size.nodes,
            "parallelism": size.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            **({"suspend": True} if QUEUE_LABEL in metadata["labels"] else {}),
            "template": imposed(job, number, size, template(job, number, inputs)),
        },
    }


def template(job: Job[Any], number: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
    """The generated pod template with the user's podTemplate laid over it."""
    trainer: TrainerSpec = job.spec.trainer
    volumes, volume_mounts = mounts((place_of(found.uri) for found in inputs.values()), output_of(job))
    resources = {
        name: dict(amounts) for name in ("limits", "requests") if (amounts := getattr(trainer.resources_per_node, name))
    }
    merged_resources = merge(resources, mapping(trainer_container(trainer.pod_template), "resources"))
    container = {
        **_container(job, TRAINER, ["python", "-m", "rlhf_trainer.launch"]),
        "env": environment(job.spec, shape(trainer, merged_resources).threads),
        "resources": resources,
        "ports": [
            {"name": "status", "containerPort": STATUS_PORT},
            {"name": "rendezvous", "containerPort": RENDEZVOUS_PORT},
        ],
        "volumeMounts": [
            {"name": "config", "mountPath": ATTEMPT_CONFIG_PATH.rpartition("/")[0], "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *volume_mounts,
        ],
    }
    base = {
        "metadata": {"labels": _labels(job, number, TRAINER)},
        "spec": {
            **_pod_spec(),
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "subdomain": job.attempt_name(number),
            "containers": [container],
            "volumes": [
                {"name": "config", "configMap": {"name": job.attempt_name(number)}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                *volumes,
            ],
        },
    }
    merged: dict[str, Any] = merge(base, trainer.pod_template)
    return merged


def imposed(job: Job[Any], number: int, size: Shape, merged: dict[str, Any]) -> dict[str, Any]:
    """What no podTemplate may change: our labels, the process group, and that the Job decides about retries."""
    name = job.attempt_name(number)
    ours = {
        "metadata": {"labels": _labels(job, number, TRAINER)},
        "spec": {
            "restartPolicy": "Never",
            "subdomain": name,
            "containers": [{"name": TRAINER, "env": _rendezvous_env(name, size)}],
        },
    }
    result: dict[str, Any] = merge(merged, ours)
    return result


def trainer_container(pod_template: Mapping[str, Any]) -> Mapping[str, Any]:
    containers = mappings(pod_template, "spec", "containers")
    return next((container for container in containers if container.get("name") == TRAINER), {})


def size_of(job: Job[Any]) -> Shape:
    """By the merged trainer container, because podTemplate may change its resources."""
    merged = merge(template(job, 1, {}), {})
    return shape(job.spec.trainer, mapping(trainer_container(merged), "resources"))


def _rendezvous_env(name: str, size: Shape) -> list[Any]:
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_LABEL}']"}}
    return [
        {"name": "PET_NNODES", "value": str(size.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(size.processes)},
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(RENDEZVOUS_PORT)},
    ]


def _container(job: Job[Any], name: str, command: list[str]) -> dict[str, Any]:
    settings = job.observed.settings
    return {
        "name": name,
        "image": job.spec.trainer.image or settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": command,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }


def _pod_spec() -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def reporter(job: Job[Any], number: int) -> Object:
    """Reads result.json again after the pods vanished with their messages; the operator itself never opens data."""
    output = output_of(job)
    path = output.joined(f"a{number}", "result.json").at(OUT_ROOT)
    volumes, volume_mounts = mounts((), output, writable=False)
    labels = _labels(job, number, REPORTER)
    pod_spec = mapping(merge({"spec": _pod_spec()}, job.spec.trainer.pod_template), "spec")
    reach = {field: pod_spec[field] for field in _REACH if field in pod_spec}
    container = {
        **_container(job, REPORTER, ["python", "-m", "rlhf_trainer.report", "--result", path]),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, *volume_mounts],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, job.report_name(number), number, REPORTER),
        "spec": {
            "backoffLimit": 1,
            "activeDeadlineSeconds": _REPORT_SECONDS,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    **_pod_spec(),
                    **reach,
                    "containers": [container],
                    "volumes": [{"name": "tmp", "emptyDir": {}}, *volumes],
                },
            },
        },
    }
