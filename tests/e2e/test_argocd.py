"""The health script for Argo CD, run by a real Lua."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_operator.api.policy_rollout_status import RolloutPhase
from rlhf_operator.api.training_status import JobPhase
from sandbox import debian
from sandbox.progress import Progress

CONFIG_MAP = Path(__file__).resolve().parents[2] / "manifests/argocd/health.yaml"
SEEN = {"observedGeneration": 2}
PROGRESSING = {"type": "Progressing", "status": "False", "message": "rolled back: safety 4.1 % against 0.2 %"}


@pytest.fixture(scope="module")
def lua() -> str:
    if shutil.which("lua5.4") is None:
        debian.install(["lua5.4"], Progress())
    return "lua5.4"


@pytest.fixture(scope="module")
def script() -> str:
    customizations = yaml.safe_load(CONFIG_MAP.read_text())["data"]["resource.customizations"]
    return str(yaml.safe_load(customizations)["rlhf.dev/*"]["health.lua"])


def literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"[{json.dumps(key)}]={literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ",".join(literal(item) for item in value) + "}"
    return json.dumps(value)


def health(lua: str, script: str, **fields: Any) -> tuple[str, str]:
    """Status and message, as Argo CD gets them: it sets `obj` and takes what the script returns."""
    obj = literal({"kind": "PolicyRollout", "metadata": {"generation": 2}, **fields})
    program = f"obj = {obj}\nlocal h = (function()\n{script}\nend)()\nprint(h.status)\nprint(h.message)\n"
    done = subprocess.run([lua, "-"], input=program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, message = done.stdout.splitlines()
    return status, message


@pytest.mark.parametrize("status", [{}, {"status": {}}, {"status": {"phase": "Healthy", "observedGeneration": 1}}])
def test_what_the_operator_has_not_seen_is_progressing(lua: str, script: str, status: dict[str, Any]) -> None:
    assert health(lua, script, **status) == ("Progressing", "the operator has not seen this generation yet")


def test_every_phase_has_its_health(lua: str, script: str) -> None:
    expected = dict.fromkeys([*JobPhase, *RolloutPhase], "Progressing")
    expected |= dict.fromkeys(("Succeeded", "Healthy"), "Healthy")
    expected |= dict.fromkeys(("Failed", "RolledBack", "Degraded"), "Degraded")
    expected |= dict.fromkeys(("Suspended", "Paused", "AwaitingApproval"), "Suspended")

    found = {phase: health(lua, script, status={**SEEN, "phase": str(phase)})[0] for phase in expected}

    assert found == expected


@pytest.mark.parametrize(
    ("phase", "conditions", "message"),
    [
        ("Succeeded", [{"type": "Validated", "status": "True", "message": "accuracy 0.71"}], "accuracy 0.71"),
        ("Failed", [{"type": "Failed", "status": "True", "message": "gate"}], "gate"),
        ("RolledBack", [{"type": "Degraded", "status": "False", "message": "fine"}, PROGRESSING], "rolled back"),
        ("AwaitingApproval", [{"type": "Approved", "status": "False", "message": "stage 3"}], "stage 3"),
    ],
)
def test_the_condition_that_decided_is_the_message(
    lua: str, script: str, phase: str, conditions: list[dict[str, str]], message: str
) -> None:
    _, found = health(lua, script, status={**SEEN, "phase": phase, "conditions": conditions})

    assert found.startswith(f"{phase}: {message}")


def test_a_decision_is_always_healthy(lua: str, script: str) -> None:
    found = health(lua, script, kind="Decision", spec={"action": "Approve", "by": "alice"})

    assert found == ("Healthy", "Approve by alice")
