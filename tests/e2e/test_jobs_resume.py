"""Real DeepSpeed over two pods, killed, suspended and corrupted on the way: the artifact is the undisturbed one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.jobs_world import CLAIM, Namespace, condition

NODES = 2
EVERY = 20


def spec(digests: dict[str, str]) -> dict[str, Any]:
    def source(path: str) -> dict[str, str]:
        return {"uri": f"pvc://{CLAIM}/{path}", "digest": digests[path]}

    return {
        "baseModel": source("models/desk-sft"),
        "preferences": source("feedback/careful.jsonl"),
        "training": {"epochs": 8, "globalBatchSize": 16, "ensemble": {"members": 2}, "seed": 7},
        "validation": {"minAccuracy": 0.0, "maxCalibrationError": 1.0},
        "trainer": {
            "numNodes": NODES,
            "numProcPerNode": 1,
            "resourcesPerNode": {"requests": {"cpu": "500m"}},  # else it gets next to nothing of a busy machine
        },
        "failurePolicy": {"rendezvousSeconds": 900},
        "checkpoints": {"everySteps": EVERY, "keepLast": 3},
    }


def checkpointed(jobs: Namespace, name: str) -> None:
    """Until a checkpoint is in the status; being stopped, the pods save another one."""
    jobs.wait(f"rewardmodeljob/{name}", "condition=Checkpointed", seconds=600)
    progress = jobs.status(name)["progress"]
    assert progress["expectedEndAt"] > progress["reportedAt"]


def checkpoints_of(jobs: Namespace, name: str) -> list[Path]:
    uid = jobs.get("rewardmodeljob", name)["metadata"]["uid"]
    return sorted(
        (path for path in (jobs.folder / "out" / name / uid).glob("a*/checkpoints/step-*") if path.is_dir()),
        key=lambda path: path.name,
    )


def artifact(jobs: Namespace, name: str) -> str:
    status = jobs.ended(name, "Complete", seconds=900)
    assert condition(status, "Validated") == ("True", "AsExpected")
    assert status["progress"]["worldSize"] == NODES
    return str(status["artifact"]["digest"])


def test_a_disturbed_run_ends_with_the_undisturbed_artifact(jobs: Namespace) -> None:
    common = spec(jobs.bring_desk())

    jobs.create("calm", **common)
    expected = artifact(jobs, "calm")
    assert jobs.status("calm")["attempt"] == 1

    jobs.create("killed", **common)
    checkpointed(jobs, "killed")
    victim = jobs.pods("killed")[1]["metadata"]["name"]
    jobs.kubectl("delete", "pod", victim, "--wait=false")
    jobs.wait("rewardmodeljob/killed", "jsonpath={.status.attempt}=2", seconds=300)
    assert artifact(jobs, "killed") == expected
    attempts = jobs.status("killed")["attempts"]
    assert (attempts[0]["failureClass"], attempts[0]["counted"]) == ("Preempted", False)
    assert attempts[1]["resumedFromStep"] > 0
    assert jobs.events("killed", "Resumed")

    jobs.create("corrupt", **common)
    checkpointed(jobs, "corrupt")
    jobs.patch("corrupt", suspend=True)
    jobs.wait("rewardmodeljob/corrupt", "condition=Suspended", seconds=300)
    *_, before, newest = checkpoints_of(jobs, "corrupt")
    damage(newest)
    jobs.patch("corrupt", suspend=False)
    assert artifact(jobs, "corrupt") == expected
    [skipped] = jobs.events("corrupt", "CheckpointSkipped")
    assert newest.name in skipped
    assert jobs.status("corrupt")["attempts"][1]["resumedFromStep"] == int(before.name.removeprefix("step-"))


def damage(checkpoint: Path) -> None:
    """One byte of the largest file flips: its length, and its manifest, stay."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
