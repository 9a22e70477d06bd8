"""Writing checkpoints: aside, synced, hashed, then renamed whole; and loading them at any number of ranks. No torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_trainer.checkpoint import (
    FORMAT_VERSION,
    CheckpointRefused,
    Component,
    FileEntry,
    Found,
    Manifest,
    Sharded,
    attempt_folder,
    checkpoint_path,
    newest_verified,
    published,
    step_and_attempt,
    sync_folder,
    verify,
)
from rlhf_trainer.digests import MANIFEST, file_digest
from rlhf_trainer.waiting import on_main
from rlhf_trainer.wire import CheckpointRecord, SkippedCheckpoint

if TYPE_CHECKING:
    from rlhf_trainer.distributed import World


class CheckpointStore:
    """Writes this attempt's checkpoints and finds the one to resume from. Every method is collective."""

    def __init__(
        self,
        run: Path,
        attempt: int,
        config_digest: str,
        keep_last: int,
        world: World,
        clock: Callable[[], datetime],
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._world = world
        self._clock = clock
        if world.is_main:
            for leftover in _leftovers(run, attempt):
                _remove(leftover)
        world.barrier()

    def save(
        self, step: int, components: Mapping[str, Component], alive: Callable[[], None] = lambda: None
    ) -> CheckpointRecord:
        """Publishes all components as one checkpoint, then prunes; ``alive`` is called while it hashes, this one's
        files and those of all that are kept. Raises OSError (disk full, ...) unpublished."""
        final = checkpoint_path(self._run, self._attempt, step)
        aside = final.with_name(f".{final.name}.writing")
        if self._world.is_main:
            for name in components:
                (aside / name).mkdir(parents=True)
        self._world.barrier()
        for name, component in components.items():
            component.save(aside / name)
        self._world.barrier()
        files = self._hash_files(aside, alive)
        manifest = self._world.broadcast(
            Manifest(
                version=FORMAT_VERSION,
                step=step,
                attempt=self._attempt,
                world_size=self._world.size,
                config_digest=self._config_digest,
                time=self._clock(),
                components=tuple(components),
                files=files,
            ).sealed()
        )
        if self._world.is_main:
            _publish(aside, final, manifest)
        on_main(self._world, lambda: self._prune(final, components), alive)
        return Found(final, manifest).record

    def find(
        self, required: Collection[str], alive: Callable[[], None]
    ) -> tuple[Found | None, tuple[SkippedCheckpoint, ...]]:
        """``newest_verified`` judged once, by rank 0, for all ranks; ``alive`` is called while it hashes."""
        return on_main(self._world, lambda: newest_verified(self._run, self._config_digest, required), alive)

    def load(self, found: Found, components: Mapping[str, Component], alive: Callable[[], None]) -> None:
        """Fills ``components`` from ``found``, converting what another number of ranks sharded differently."""
        converting = found.manifest.world_size != self._world.size
        for name, component in components.items():
            if converting and isinstance(component, Sharded):
                self._load_resharded(found.path / name, component, alive)
            else:
                component.load(found.path / name)

    def _load_resharded(self, folder: Path, component: Sharded, alive: Callable[[], None]) -> None:
        scratch = attempt_folder(self._run, self._attempt) / "checkpoints" / f".{folder.name}.resharding"
        if self._world.is_main:
            scratch.mkdir(parents=True)
        self._world.barrier()
        component.load_resharded(folder, scratch, alive)
        self._world.barrier()
        if self._world.is_main:
            shutil.rmtree(scratch)

    def _hash_files(self, folder: Path, alive: Callable[[], None]) -> dict[str, FileEntry]:
        """Syncs and hashes all files, shared out over the ranks."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = {}
        for path in paths[self._world.rank :: self._world.size]:
            mine[path.relative_to(folder).as_posix()] = _sync_and_hash(path, folder)
            alive()
        return dict(sorted(item for part in self._world.gather(mine) for item in part.items()))

    def _prune(self, just_published: Path, required: Collection[str]) -> None:
        """Deletes what is older than the ``keep_last`` newest checkpoints that verify, of this and older attempts.

        A checkpoint that ``find`` would refuse never counts as kept, so the only good one is never deleted; neither is
        the one just published, be an abandoned attempt ahead of it.
        """
        kept = 0
        for path in published(self._run):
            if path.parent.parent.name != f"a{self._attempt}" and (step_and_attempt(path) or (0, 0))[1] > self._attempt:
                continue
            if path == just_published:
                kept += 1
            elif kept >= self._keep_last:
                _delete(path)
            elif self._verifies(path, required):
                kept += 1

    def _verifies(self, path: Path, required: Collection[str]) -> bool:
        try:
            verify(path, self._config_digest, required)
        except CheckpointRefused:
            return False
        return True


def _leftovers(run: Path, attempt: int) -> Iterator[Path]:
    """What killed processes left behind: in this attempt's folder all that was never published, in older attempts'
    only what was being deleted, for a partitioned one may still be saving."""
    for folder in run.glob("a*/checkpoints"):
        number = folder.parent.name.removeprefix("a")
        if number == str(attempt):
            yield from folder.glob(".*")
        elif number.isdigit() and int(number) < attempt:
            yield from folder.glob(".*.deleted")


def _delete(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    with suppress(FileNotFoundError):
        checkpoint.rename(doomed)  # first, so that a kill in between leaves no half checkpoint
    _remove(doomed)


def _remove(folder: Path) -> None:
    """An attempt that was abandoned, but lives, prunes its folder too: what goes meanwhile need not be deleted."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _component_of(relative: Path) -> str:
    """The first folder; an engine's files are told apart, since model and optimiser are lost separately."""
    name = relative.parts[0]
    if relative.name.endswith("optim_states.pt"):
        return f"{name}/optimizer"
    if relative.name.endswith("model_states.pt"):
        return f"{name}/model"
    return name


def _sync_and_hash(path: Path, folder: Path) -> FileEntry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(
        sha256=file_digest(path), size=path.stat().st_size, component=_component_of(path.relative_to(folder))
    )


def _publish(aside: Path, final: Path, manifest: Manifest) -> None:
    with (aside / MANIFEST).open("w") as file:
        file.write(json.dumps(json.loads(manifest.to_json()), indent=1))
        file.flush()
        os.fsync(file.fileno())
    for folder in _folders(aside):
        sync_folder(folder)
    stale = final.with_name(f".{final.name}.stale")
    if final.exists():  # the same attempt came here before: its pods were started again
        final.rename(stale)
    aside.rename(final)
    sync_folder(final.parent)
    if stale.exists():
        shutil.rmtree(stale)


def _folders(root: Path) -> Iterator[Path]:
    yield from (path for path in root.rglob("*") if path.is_dir())
    yield root
