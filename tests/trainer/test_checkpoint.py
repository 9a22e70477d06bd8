"""A checkpoint is whole or refused by the name of what is missing, and the newest good one is never lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_trainer.__main__ import main as inspect
from rlhf_trainer.checkpoint import (
    CheckpointRefused,
    Component,
    checkpoint_path,
    newest_verified,
    published,
    verify,
)
from rlhf_trainer.checkpoint_store import CheckpointStore
from rlhf_trainer.components import JsonState, RandomState, TensorState
from rlhf_trainer.distributed import World, join
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.exits import Invalid

DIGEST = "sha256:" + "a" * 64
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def world() -> World:
    return join(timedelta(seconds=60))


class Box:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def put(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def components_of(world: World, box: Box) -> dict[str, Component]:
    return {"klController": JsonState(world, lambda: {"value": box.value}, box.put), "random": RandomState(world)}


def store_of(run: Path, world: World, attempt: int = 1, keep_last: int = 3) -> CheckpointStore:
    return CheckpointStore(run, attempt, DIGEST, keep_last, world, lambda: NOW)


def damage(path: Path) -> None:
    """One flipped bit: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edited(**changes: Any) -> Callable[[Path], None]:
    """Fields of the manifest, changed by hand."""

    def spoil(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def test_state_comes_back_with_the_random_numbers(tmp_path: Path, world: World) -> None:
    box, norms = Box(7), {"mean": torch.tensor([1.5, 2.5])}
    loaded: dict[str, torch.Tensor] = {}
    components = {
        **components_of(world, box),
        "rewardNormaliser": TensorState(world, lambda: norms, loaded.update),
    }
    store = store_of(tmp_path, world)
    record = store.save(10, components)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))
    box.value = 0
    found, skipped = store.find(components, lambda: None)
    assert found is not None
    assert (found.record, skipped) == (record, ())
    store.load(found, components, lambda: None)
    assert box.value == 7
    assert torch.equal(loaded["mean"], norms["mean"])
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A real checkpoint of a ZeRO-2 engine and small state."""
    torch.manual_seed(0)
    engine = Engine(nn.Linear(4, 1), EngineOptions(zero_stage=2, learning_rate=0.1, rows_per_step=2), world)
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
    run = tmp_path_factory.mktemp("full")
    store_of(run, world).save(1, {"engine": engine, **components_of(world, Box())})
    engine.close()
    return checkpoint_path(run, 1, 1)


def test_an_engines_model_and_optimizer_are_told_apart(full: Path) -> None:
    names = {entry.component for entry in verify(full, DIGEST).manifest.files.values()}
    assert {"engine/model", "engine/optimizer", "klController", "random"} <= names


@pytest.mark.parametrize("how", ["deleted", "altered", "cut"])
@pytest.mark.parametrize("component", ["engine/model", "engine/optimizer", "klController", "random"])
def test_each_component_is_missed_by_name(full: Path, tmp_path: Path, component: str, how: str) -> None:
    copy = tmp_path / "a1" / "checkpoints" / full.name
    shutil.copytree(full, copy)
    manifest = verify(copy, DIGEST).manifest
    victim = copy / next(path for path, entry in manifest.files.items() if entry.component == component)
    if how == "deleted":
        victim.unlink()
    elif how == "altered":
        damage(victim)
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(CheckpointRefused, match=f"component '{component}'.*{victim.name}"):
        verify(copy, DIGEST)
    found, skipped = newest_verified(tmp_path, DIGEST)
    assert found is None
    assert [each.step for each in skipped] == [1]
    assert component in skipped[0].reason


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest"),
    "manifest a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest"),
    "manifest not UTF-8": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest"),
    "manifest edited": (edited(step=99), "manifest"),
    "entry taken out": (edited(files={}), "manifest"),
    "file emptied": (lambda folder: os.truncate(folder / "klController" / "state.json", 0), "klController"),
    "folder deleted": (lambda folder: shutil.rmtree(folder / "klController"), "klController"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, world: World, how: str) -> None:
    """No bad input that ends the attempt: a run with an older good one goes on from it, and says what was wrong."""
    spoil, component = DAMAGE[how]
    store = store_of(tmp_path, world)
    for step in (1, 2):
        store.save(step, components_of(world, Box(step)))
    spoil(checkpoint_path(tmp_path, 1, 2))
    box = Box()
    found, skipped = store.find(components_of(world, box), lambda: None)
    assert found is not None
    store.load(found, components_of(world, box), lambda: None)
    assert (found.manifest.step, box.value) == (1, 1)
    assert [each.step for each in skipped] == [2]
    assert f"component '{component}'" in skipped[0].reason
    assert "\n" not in skipped[0].reason


def test_a_component_the_loop_needs_must_be_there(full: Path) -> None:
    with pytest.raises(CheckpointRefused, match="component 'lagrange' is missing"):
        verify(full, DIGEST, required=["engine", "lagrange"])


def test_a_checkpoint_of_another_run_is_refused(full: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"written under config sha256:a+, this run has sha256:b"):
        verify(full, "sha256:b")


@pytest.mark.parametrize("manifest", [b"", b"{", b'{"version": 1}'])
def test_a_broken_manifest_is_refused_not_raised(tmp_path: Path, world: World, manifest: bytes) -> None:
    store_of(tmp_path, world).save(3, components_of(world, Box()))
    (checkpoint_path(tmp_path, 1, 3) / "manifest.json").write_bytes(manifest)
    found, skipped = newest_verified(tmp_path, DIGEST)
    assert found is None
    assert "manifest" in skipped[0].reason


def test_the_newest_good_one_of_all_attempts_wins(tmp_path: Path, world: World) -> None:
    for attempt, steps in ((1, (2, 4)), (2, (4, 6))):
        for step in steps:
            store_of(tmp_path, world, attempt, keep_last=9).save(step, components_of(world, Box(step)))
    damage(checkpoint_path(tmp_path, 2, 6) / "klController" / "state.json")
    found, skipped = newest_verified(tmp_path, DIGEST)
    assert found is not None
    assert found.path == checkpoint_path(tmp_path, 2, 4)
    assert [each.step for each in skipped] == [6]
    assert "klController" in skipped[0].reason


def test_pruning_keeps_the_last_and_counts_only_good_ones(tmp_path: Path, world: World) -> None:
    store = store_of(tmp_path, world, keep_last=2)
    for step in (1, 2, 3):
        store.save(step, components_of(world, Box()))
    assert [path.name[-1] for path in published(tmp_path)] == ["3", "2"]
    damage(checkpoint_path(tmp_path, 1, 3) / "klController" / "state.json")
    store.save(4, components_of(world, Box()))
    assert [path.name[-1] for path in published(tmp_path)] == ["4", "3", "2"], "3 is bad, so 2 is still the second good"


def test_pruning_spares_newer_attempts(tmp_path: Path, world: World) -> None:
    store_of(tmp_path, world, attempt=2).save(2, components_of(world, Box()))
    partitioned = store_of(tmp_path, world, attempt=1, keep_last=1)
    for step in (1, 3):
        partitioned.save(step, components_of(world, Box()))
    assert checkpoint_path(tmp_path, 2, 2).is_dir()


def test_what_a_run_cannot_resume_from_does_not_push_out_what_it_can(tmp_path: Path, world: World) -> None:
    """A newer trainer keeps one more component: it begins anew, behind checkpoints that are whole and of no use."""
    for step in (90, 100):
        store_of(tmp_path, world).save(step, components_of(world, Box()))
    more = {**components_of(world, Box()), "oversight": JsonState(world, dict, lambda _: None)}
    store = store_of(tmp_path, world, attempt=2, keep_last=1)
    found, skipped = store.find(more, lambda: None)
    assert (found, len(skipped)) == (None, 2)
    for step in (10, 20):
        record = store.save(step, more)
        found, _ = store.find(more, lambda: None)
        assert found is not None, "the only checkpoint to resume from was deleted as it was published"
        assert found.record == record
    assert [path.name[-2:] for path in published(tmp_path)] == ["00", "90", "20"], "10 is beyond keepLast"


def test_a_checkpoint_stays_where_an_abandoned_attempt_is_ahead(tmp_path: Path, world: World) -> None:
    store, abandoned = (store_of(tmp_path, world, attempt, keep_last=1) for attempt in (2, 1))
    abandoned.save(100, components_of(world, Box()))
    record = store.save(10, components_of(world, Box()))
    assert verify(Path(record.path), DIGEST).record == record, "it was said to be published"


class Empty:
    """Its file can be replaced by a pipe: hashing then waits until somebody has written."""

    def save(self, folder: Path) -> None:
        (folder / "nothing").touch()

    def load(self, folder: Path) -> None: ...


def test_an_abandoned_attempt_that_prunes_too_ends_nothing(tmp_path: Path, world: World) -> None:
    """While the second attempt verifies step 2 of the first, the first deletes its step 1."""
    for step in (1, 2):
        store_of(tmp_path, world).save(step, {"empty": Empty()})
    store, pipe = store_of(tmp_path, world, attempt=2, keep_last=2), checkpoint_path(tmp_path, 1, 2) / "empty/nothing"
    pipe.unlink()
    os.mkfifo(pipe)

    def prune() -> None:
        with pipe.open("wb"):  # opens when the second attempt hashes
            shutil.rmtree(checkpoint_path(tmp_path, 1, 1))

    abandoned = threading.Thread(target=prune)
    abandoned.start()
    record = store.save(3, {"empty": Empty()})
    abandoned.join()
    assert verify(Path(record.path), DIGEST).record == record


def test_an_unfinished_save_is_never_seen_and_cleared_away(tmp_path: Path, world: World) -> None:
    class Failing:
        def save(self, folder: Path) -> None:
            raise OSError(28, f"no space left for {folder}")

        def load(self, folder: Path) -> None: ...

    store = store_of(tmp_path, world)
    store.save(1, components_of(world, Box()))
    with pytest.raises(OSError, match="no space"):
        store.save(2, {**components_of(world, Box()), "broken": Failing()})
    assert [path.name for path in published(tmp_path)] == ["step-00000001"]
    store_of(tmp_path, world).save(2, components_of(world, Box()))
    assert [path.name for path in published(tmp_path)] == ["step-00000002", "step-00000001"]
    assert not list(tmp_path.glob("a*/checkpoints/.*"))


def test_the_same_step_saved_again_replaces_what_was_there(tmp_path: Path, world: World) -> None:
    store = store_of(tmp_path, world)
    first = store.save(1, components_of(world, Box(1)))
    second = store.save(1, components_of(world, Box(2)))
    assert first.digest != second.digest
    assert verify(checkpoint_path(tmp_path, 1, 1), DIGEST).record == second


def test_rows_that_do_not_divide_are_refused() -> None:
    world = World(rank=0, size=3, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(Invalid, match="16 rows does not divide over 3 ranks"):
        Engine(nn.Linear(2, 1), EngineOptions(zero_stage=0, learning_rate=0.1, rows_per_step=16), world)


def test_a_person_can_inspect_a_run(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["checkpoints", str(tmp_path)]) == 2
    store = store_of(tmp_path, world)
    for step in (1, 2):
        store.save(step, components_of(world, Box()))
    assert inspect(["checkpoints", str(tmp_path)]) == 0
    damage(checkpoint_path(tmp_path, 1, 2) / "klController" / "state.json")
    capsys.readouterr()
    assert inspect(["checkpoints", str(tmp_path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("refused")
    assert "klController" in first
    assert second.startswith("verified")
