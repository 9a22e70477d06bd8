"""SIGKILL at every file operation of a save: what is published is always whole, and something is always there.

With two ranks one of them is killed, either in turn, and the other is left to find out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The ranks of every kill point are processes of their own, forked from one that has torch loaded already. The audit
# hook counts the file operations of the victim below the run's folder (open, mkdir, rename, rmtree, ...) and kills
# before the n-th. Peers meet through a file beside that folder.
SCRIPT = """
import json, os, shutil, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
import numpy.ctypeslib, numpy.random, torch, torch.utils.serialization  # all that every child would import anew
torch.set_num_threads(1)
from rlhf_trainer import checkpoint_store
from rlhf_trainer.checkpoint import newest_verified, published, read_manifest, verify, CheckpointRefused
from rlhf_trainer.components import JsonState, RandomState, TensorState
from rlhf_trainer.distributed import join

root, careless, ranks = Path(sys.argv[1]), sys.argv[2] == "careless", int(sys.argv[3])
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

def save_until(run, rank, point):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    if ranks > 1:
        store = torch.distributed.FileStore(f"{run}.peers", ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
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

def child(run, rank, point):
    process = os.fork()
    if process == 0:
        try:
            save_until(run, rank, point)
            os._exit(0)
        finally:  # a peer that was left alone
            os._exit(1)
    return process

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

def killed_at(run, victim, point):
    # Whether the victim got to its end instead.
    run.mkdir(parents=True)
    processes = [child(run, rank, point if rank == victim else None) for rank in range(ranks)]
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    ended = statuses == [0] * ranks
    killed = os.WIFSIGNALED(statuses[victim]) and os.WTERMSIG(statuses[victim]) == signal.SIGKILL
    assert ended or killed, f"rank {victim}, point {point}: wait statuses {statuses}"
    return ended

report = []
for victim in range(ranks):
    for point in range(1, 10_000):
        run = root / f"{victim}-{point}"
        ended = killed_at(run, victim, point)
        report.append({"victim": victim, "point": point, **state_of(run)})
        if ended or (careless and report[-1]["broken"]):
            break
print(json.dumps(report))
"""


def killed_everywhere(folder: Path, mode: str, ranks: int) -> list[dict[str, Any]]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "runs"), mode, str(ranks)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_kill_of_either_rank_at_any_file_operation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    report = killed_everywhere(tmp_path, "as-is", 2)
    for victim, least in ((0, 60), (1, 15)):
        points = sum(each["victim"] == victim for each in report)
        assert points > least, "every open, rename and removal of two saves"
    assert [each for each in report if each["broken"]] == []
    assert {each["newest"] for each in report} == {2, 3}, "the one before, then the new one"


def test_a_save_that_publishes_first_is_caught(tmp_path: Path) -> None:
    """Negative control: renaming before the manifest is written shows as a published folder that is not whole."""
    report = killed_everywhere(tmp_path, "careless", 1)
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
