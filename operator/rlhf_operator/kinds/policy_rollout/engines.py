"""What runs in a policy server's container, by engine; the pod around it is the same for all (``servers``).

    builtin   the trainer image; refuses a folder that is not the pinned one, and drains, by itself
    vllm      `vllm serve` on the policy's folder
    custom    any server that speaks the OpenAI API on the port and is healthy when it is ready

Servers that know nothing of digests get an init container of the trainer image that checks the folder before them, so
that no engine can serve what was not judged. They do not know either that a Service forgets a pod a moment after the
pod was told to go: SIGTERM waits for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_gateway.wire import SERVE_PORT
from rlhf_operator.api.policy_rollout import ServingEngine
from rlhf_operator.api.policy_rollout_status import Revision
from rlhf_operator.kinds.policy_rollout.observe import View

GRACE_SECONDS = 60  # for answers in flight, streams too
_UNROUTED_SECONDS = 5  # as long as the builtin server accepts after SIGTERM
_DRAIN_SECONDS = 50
# Nothing is fetched, nobody is told, and whatever is cached goes to the one place that can be written. torch asks for
# the name of a user who is in no passwd file.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HOME": "/tmp", "USER": "policy"}


@dataclass(frozen=True)
class Engine:
    """Parts of a pod: of the server's container, and what stands before and beside it."""

    container: dict[str, Any]
    checks: tuple[dict[str, Any], ...] = ()  # init containers
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()


def server(view: View, revision: Revision, model: str, threads: int) -> Engine:
    """`model`: the policy's folder in the pod."""
    engine = view.spec.serving.engine
    if engine is ServingEngine.BUILTIN:
        return _builtin(view, revision, model, threads)
    return _vllm(view, revision, model) if engine is ServingEngine.VLLM else _custom(view, revision, model)


def _builtin(view: View, revision: Revision, model: str, threads: int) -> Engine:
    return Engine(
        {
            "image": revision.image,
            "command": ["python", "-m", "rlhf_trainer.serve"],
            "args": ["--model", model, "--served-name", view.name, "--digest", revision.digest],
            "env": [{"name": "OMP_NUM_THREADS", "value": str(threads)}],
        }
    )


def _vllm(view: View, revision: Revision, model: str) -> Engine:
    """Its ranks of one pod talk through shared memory, of which a container has 64 MiB unless it is given more."""
    asked = ["--served-model-name", view.name, "--host", "0.0.0.0", "--port", str(SERVE_PORT)]
    drain = ["--shutdown-timeout", str(_DRAIN_SECONDS)]
    return Engine(
        {
            **_of_others(view, revision, model, _OFFLINE),
            "command": ["vllm", "serve"],
            "args": [model, *asked, *drain, *view.spec.serving.args],
        },
        checks=(_check(view, revision, model),),
        volumes=({"name": "shm", "emptyDir": {"medium": "Memory"}},),
        mounts=({"name": "shm", "mountPath": "/dev/shm"},),
    )


def _custom(view: View, revision: Revision, model: str) -> Engine:
    given = {"command": view.spec.serving.command, "args": view.spec.serving.args}
    container = {**_of_others(view, revision, model, {}), **{name: words for name, words in given.items() if words}}
    return Engine(container, checks=(_check(view, revision, model),))


def _of_others(view: View, revision: Revision, model: str, environment: dict[str, str]) -> dict[str, Any]:
    told = {"RLHF_MODEL_PATH": model, "RLHF_SERVED_NAME": view.name, "RLHF_MODEL_DIGEST": revision.digest}
    return {
        "image": view.spec.serving.image,
        "env": [{"name": name, "value": value} for name, value in (told | environment).items()],
        "lifecycle": {"preStop": {"sleep": {"seconds": _UNROUTED_SECONDS}}},
    }


def _check(view: View, revision: Revision, model: str) -> dict[str, Any]:
    return {
        "name": "verify",
        "image": revision.image,
        "imagePullPolicy": view.observed.settings.image_pull_policy,
        "command": ["python", "-m", "rlhf_trainer.serve.verify"],
        "args": ["--model", model, "--digest", revision.digest],
    }
