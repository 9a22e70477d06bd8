"""A cluster to play on: the sandbox, or the one a kubeconfig names; the operator from our own charts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from demo import toolbox
from demo.cluster import Cluster, CommandError, Object
from demo.view import View
from sandbox.cluster import Cluster as SandboxCluster

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "desk"
OPERATOR_NAMESPACE = "rlhf-system"
SAFETY_FILTER = "models/safety-filter.json"


@dataclass(frozen=True)
class Images:
    operator: str
    trainer: str


SANDBOX_IMAGES = Images("docker.io/library/rlhf-operator:dev", "docker.io/library/rlhf-trainer:dev")


def on_sandbox(view: View) -> tuple[Cluster, Images]:
    """Starts the sandbox (a no-op when it is up) and builds the images from this checkout (skipped when unchanged)."""
    sandbox = (sys.executable, "-m", "sandbox")
    for arguments, what in ((("up",), "Kubernetes"), (("load",), "images")):
        view.say(f"{what}: python -m sandbox {' '.join(arguments)}")
        if subprocess.run((*sandbox, *arguments), cwd=ROOT, check=False).returncode:
            raise CommandError(
                f"the sandbox could not bring up its {what}; its reasons are above. "
                "To play on another cluster: make demo KUBECONFIG=… OPERATOR_IMAGE=… TRAINER_IMAGE=…"
            )
    started = SandboxCluster.from_environment()
    cluster = Cluster(tuple(started.kubectl_command()), tuple(started.helm_command()), {}, NAMESPACE)
    namespace(cluster)
    if cluster.get("pvc", toolbox.CLAIM) is None:
        subprocess.run((*sandbox, "volume", f"{NAMESPACE}/{toolbox.CLAIM}"), cwd=ROOT, check=True)
    return cluster, SANDBOX_IMAGES


def on_kubeconfig(view: View, kubeconfig: Path) -> tuple[Cluster, Images]:
    """The user's own cluster: kubectl and helm from PATH, images from a registry it can pull from."""
    images = Images(os.environ.get("OPERATOR_IMAGE", ""), os.environ.get("TRAINER_IMAGE", ""))
    if not (images.operator and images.trainer):
        raise CommandError(
            "another cluster pulls its images from a registry: build Dockerfile.operator and Dockerfile.trainer, push "
            "them, and name them with OPERATOR_IMAGE=… TRAINER_IMAGE=…"
        )
    cluster = Cluster(("kubectl",), ("helm",), {"KUBECONFIG": str(kubeconfig)}, NAMESPACE)
    view.say(f"using the cluster of {kubeconfig}")
    namespace(cluster)
    cluster.apply(claim())
    return cluster, images


def namespace(cluster: Cluster) -> None:
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}})


def claim() -> Object:
    """Several pods write checkpoints side by side, so the volume must be shared."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": toolbox.CLAIM},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "2Gi"}}},
    }


def install(cluster: Cluster, images: Images) -> None:
    """The two charts, as any user would install them."""
    helm = (
        "upgrade",
        "--install",
        "--namespace",
        OPERATOR_NAMESPACE,
        "--create-namespace",
        "--wait",
        "--timeout",
        "3m",
    )
    cluster.helm(*helm, "rlhf-operator-crds", str(ROOT / "helm/rlhf-operator-crds"))
    repository, _, tag = images.operator.rpartition(":")
    deployment = ("-n", OPERATOR_NAMESPACE, "deployment/rlhf-operator")
    running = cluster.kubectl("get", *deployment, "--ignore-not-found", check=False).strip()
    cluster.helm(
        *helm,
        "rlhf-operator",
        str(ROOT / "helm/rlhf-operator"),
        *("--set", f"image.repository={repository}"),
        *("--set", f"image.tag={tag}"),
        *("--set", f"trainerImage={images.trainer}"),
    )
    if running:  # its tag stays the same when the image is built anew
        cluster.kubectl("rollout", "restart", *deployment)
        cluster.kubectl("rollout", "status", *deployment, "--timeout=120s")


def data(cluster: Cluster, images: Images, seed: int) -> dict[str, str]:
    """Generates the service desk's data on the volume once per seed; returns path -> digest."""
    where, python = toolbox.MOUNT, ("python", "-m")
    generate = [*python, "rlhf_trainer.desk", "generate", "--out", where, "--seed", str(seed)]
    made = toolbox.last_object(toolbox.run(cluster, "desk-data", images.trainer, generate))
    # The filter learns from labelled answers alone; only the oracle knows the list of secrets.
    fit = [*python, "rlhf_trainer.safety", "train", "--data", f"{where}/feedback/safety.jsonl"]
    fit += ["--out", f"{where}/{SAFETY_FILTER}"]
    made[SAFETY_FILTER] = toolbox.last_object(toolbox.run(cluster, "desk-filter", images.trainer, fit))["digest"]
    return {str(path): str(digest) for path, digest in made.items()}
