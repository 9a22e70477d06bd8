"""What serves a policy, by engine: containers that check what they load, and pods that are otherwise the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.rollout_world import A_NAME, B_NAME, A, B, World, source, trying

IMAGE = "registry.example/server@sha256:" + "1" * 64
VLLM = {"engine": "vllm", "image": IMAGE, "args": ["--tensor-parallel-size", "2"]}
CUSTOM = {"engine": "custom", "image": IMAGE, "command": ["serve"], "args": ["$(RLHF_MODEL_PATH)"]}
TOLD = ("RLHF_MODEL_PATH", "RLHF_SERVED_NAME", "RLHF_MODEL_DIGEST")


def pod_of(serving: dict[str, Any], name: str = A_NAME) -> dict[str, Any]:
    world = World(serving=serving).serving()
    spec: dict[str, Any] = world.children["Deployment", name]["spec"]["template"]["spec"]
    return spec


def parts(serving: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The server's container and its environment."""
    (container,) = pod_of(serving)["containers"]
    return container, {each["name"]: each["value"] for each in container["env"]}


def test_vllm_is_asked_for_the_policy_by_its_path_and_name() -> None:
    container, environment = parts(VLLM)
    path = environment["RLHF_MODEL_PATH"]
    assert path.startswith("/mnt/rlhf/in/")
    assert container["command"] == ["vllm", "serve"]
    assert container["args"][:3] == [path, "--served-model-name", "desk"]
    assert container["args"][-2:] == VLLM["args"]  # the user's win over ours
    assert container["image"] == IMAGE
    assert environment["HF_HUB_OFFLINE"] == "1"
    (shared,) = [volume for volume in pod_of(VLLM)["volumes"] if volume["name"] == "shm"]
    assert shared["emptyDir"] == {"medium": "Memory"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_a_custom_server_is_told_what_to_serve_and_how_to_call_it() -> None:
    container, environment = parts(CUSTOM)
    assert (container["image"], container["command"], container["args"]) == (IMAGE, ["serve"], ["$(RLHF_MODEL_PATH)"])
    assert (environment["RLHF_SERVED_NAME"], environment["RLHF_MODEL_DIGEST"]) == ("desk", A)
    assert set(environment) == set(TOLD)


def test_without_a_command_a_custom_image_has_its_own() -> None:
    container, _ = parts({"engine": "custom", "image": IMAGE})
    assert "command" not in container
    assert "args" not in container


@pytest.mark.parametrize("serving", [VLLM, CUSTOM])
def test_what_other_servers_load_is_checked_before_them_by_the_trainer(serving: dict[str, Any]) -> None:
    pod = pod_of(serving)
    (check,) = pod["initContainers"]
    assert check["image"] == "trainer:1"
    assert check["command"] == ["python", "-m", "rlhf_trainer.serve.verify"]
    assert check["args"][-2:] == ["--digest", A]
    (container,) = pod["containers"]
    assert [m for m in container["volumeMounts"] if m["name"] == "model"] == [
        m for m in check["volumeMounts"] if m["name"] == "model"
    ]
    assert container["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}


def test_the_builtin_server_checks_and_drains_by_itself() -> None:
    pod = pod_of({})
    (container,) = pod["containers"]
    assert "initContainers" not in pod
    assert "lifecycle" not in container
    assert container["args"][-2:] == ["--digest", A]


@pytest.mark.parametrize("serving", [{}, VLLM, CUSTOM])
def test_every_engine_is_restricted_and_probed_alike(serving: dict[str, Any]) -> None:
    plain, pod = pod_of({}), pod_of(serving)
    (expected,), (container,) = plain["containers"], pod["containers"]
    for field in ("startupProbe", "readinessProbe", "livenessProbe", "ports", "securityContext", "name"):
        assert container[field] == expected[field]
    for check in pod.get("initContainers", ()):
        assert check["securityContext"] == expected["securityContext"]
    assert pod["securityContext"] == plain["securityContext"]
    assert pod["terminationGracePeriodSeconds"] == 60


def test_a_candidate_that_fails_its_check_is_rejected_with_the_exit_code() -> None:
    """The init container loops, the server's own container never starts."""
    world = trying(serving=CUSTOM)
    world.unchecked.add(B_NAME)
    world.until("RolledBack")
    entry = world.entry(B)
    assert (entry["state"], entry["reason"]) == ("Rejected", "CandidateUnavailable")
    assert "exit code 11" in entry["message"]
    assert world.entry(source(A)["digest"])["state"] == "Stable"
