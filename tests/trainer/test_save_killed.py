"""SIGKILL at every file operation of a save: what is published is always whole, and something is always there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Every kill point is a process of its own, forked from one that has torch loaded already. The audit hook counts the
# file operations below the run's folder (open, mkdir, rename, rmtree, ...) and kills before the n-th.
SCRIPT = """
import json, os, shutil, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer import checkpoint_store
from rlhf_trainer.checkpoint import newest_verified, published, read_manifest, verify, CheckpointRefused
from rlhf_trainer.components import JsonState, RandomState, TensorState
from rlhf_trainer.distributed import join

root, careless = Path(sys.argv[1]), sys.argv[2] == "careless"
NAMES = ["klController", "random", "rewardNormaliser"]
DIGEST = "sha256:d"

def rename_first(aside, final, manifest):
    # The negative control: published before the manifest and its hashes are there.
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    (final / "manifest.json").write_text(manifest.to_json())

def components(world, value):
    return {
        "klController": JsonState(world, lambda: {"value": value}, lambda state: None),
        "rewardNormaliser": TensorState(world, lambda: {"mean": torch.full((4,), float(value))}, lambda state: None),
        "random": RandomState(world),
    }

def save_until(run, point):
    world = join(timedelta(seconds=60))
    store = checkpoint_store.CheckpointStore(run, 1, DIGEST, 2, world, lambda: datetime.now(UTC))
    store.save(1, components(world, 1))
    store.save(2, components(world, 2))
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event.split(".")[0] in ("open", "os", "shutil") and any(str(run) in str(each) for each in arguments[:2]):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    if careless:
        checkpoint_store._publish = rename_first
    store.save(3, components(world, 3))  # a new step, with one to prune
    store.save(2, components(world, 4))  # a step that was there before
    os._exit(0)

def state_of(run):
    broken = []
    for path in published(run):
        try:
            verify(path, DIGEST, NAMES)
        except CheckpointRefused as refusal:
            broken.append(f"{path.name}: {refusal}")
    found, _ = newest_verified(run, DIGEST, NAMES)
    if found is not None:
        value = json.loads((found.path / "klController" / "state.json").read_text())["value"]
        assert value == found.manifest.step or (found.manifest.step, value) == (2, 4), (found.path, value)
    return {"broken": broken, "newest": found and found.manifest.step}

report = []
for point in range(1, 10_000):
    run = root / str(point)
    child = os.fork()
    if child == 0:
        save_until(run, point)
    _, status = os.waitpid(child, 0)
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert ended or os.WIFSIGNALED(status), f"point {point}: status {status}"
    report.append({"point": point, **state_of(run)})
    if ended or (careless and report[-1]["broken"]):
        break
print(json.dumps(report))
"""


def killed_everywhere(folder: Path, mode: str) -> list[dict[str, Any]]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "runs"), mode],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_kill_at_any_file_operation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    report = killed_everywhere(tmp_path, "as-is")
    assert len(report) > 30, "every open, rename and removal of two saves"
    assert [each for each in report if each["broken"]] == []
    assert {each["newest"] for each in report} == {2, 3}, "the one before, then the new one"


def test_a_save_that_publishes_first_is_caught(tmp_path: Path) -> None:
    """Negative control: renaming before the manifest is written shows as a published folder that is not whole."""
    report = killed_everywhere(tmp_path, "careless")
    assert any(each["broken"] for each in report)


@pytest.mark.parametrize("misuse", ["reserved", "spaced", "twice", "not a component", "begun twice", "step skipped"])
def test_a_session_is_hard_to_misuse(request: pytest.FixtureRequest, tmp_path: Path, misuse: str) -> None:
    from datetime import UTC, datetime, timedelta

    from rlhf_trainer.components import JsonState
    from rlhf_trainer.distributed import join
    from rlhf_trainer.loops.common import Session, StopSignal
    from rlhf_trainer.ranks import RankFiles
    from rlhf_trainer.status import StatusBoard

    now = datetime(2026, 1, 1, tzinfo=UTC)
    world, config = join(timedelta(seconds=60)), request.getfixturevalue("tiny_world").config(tmp_path)
    board = StatusBoard(1, "u", 1, lambda: now)
    session = Session(config, world, board, RankFiles(tmp_path, 0), StopSignal(), lambda: now)
    part = JsonState(world, dict, lambda _state: None)
    given: dict[str, tuple[dict[str, Any], str]] = {
        "reserved": ({"random": part}, "kept by the session"),
        "spaced": ({"kl controller": part}, "camelCase"),
        "twice": ({"one": part, "two": part}, "same object"),
        "not a component": ({"one": object()}, "without save"),
    }
    if misuse in given:
        components, words = given[misuse]
        with pytest.raises(ValueError, match=words):
            session.begin(components, 10)
        return
    session.begin({"one": part}, 10)
    if misuse == "begun twice":
        with pytest.raises(RuntimeError, match="called before"):
            session.begin({"one": part}, 10)
    else:
        with pytest.raises(RuntimeError, match="every step in turn"):
            session.finish_step(2, {"loss": 1.0})
