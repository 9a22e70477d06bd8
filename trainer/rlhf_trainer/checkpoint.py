"""Complete, atomic, verifiable checkpoints. No torch: the launcher and the reporter read them too.

    <run>/a<attempt>/checkpoints/step-<8 digits>/<component>/...   plus manifest.json: a sha256 for every file

A checkpoint is a set of named components (engine, random state, data position, KL controller, ...). It is written
aside, synced, given its manifest and then renamed, so a folder called ``step-*`` is whole; a manifest that does not
match (disk fault, meddling) makes the resume fall back to the checkpoint before, and say so. An attempt writes only
below its own folder, so a partitioned old attempt cannot spoil a newer one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from rlhf_trainer.digests import MANIFEST, file_digest
from rlhf_trainer.wire import CheckpointRecord, SkippedCheckpoint, Wire, digest_of

if TYPE_CHECKING:
    from rlhf_trainer.distributed import World

FORMAT_VERSION = 1


class Component(Protocol):
    """A part of the training state. Called on every rank at the same time; collectives are allowed."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class FileEntry(Wire):
    sha256: str
    size: int
    component: str


class Manifest(Wire):
    version: int
    step: int
    attempt: int
    world_size: int
    config_digest: str
    time: datetime
    components: tuple[str, ...]
    files: dict[str, FileEntry]

    def digest(self) -> str:
        """Identity of the content: time and attempt excluded."""
        return digest_of({path: entry.sha256 for path, entry in self.files.items()})


class CheckpointRefused(Exception):
    """This checkpoint cannot be resumed from; the message names the component and what is wrong with it."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def record(self) -> CheckpointRecord:
        return CheckpointRecord(
            step=self.manifest.step,
            attempt=self.manifest.attempt,
            path=str(self.path),
            digest=self.manifest.digest(),
            time=self.manifest.time,
        )


def attempt_folder(run: Path, attempt: int) -> Path:
    return run / f"a{attempt}"


def checkpoint_path(run: Path, attempt: int, step: int) -> Path:
    return attempt_folder(run, attempt) / "checkpoints" / f"step-{step:08d}"


def published(run: Path) -> list[Path]:
    """Published checkpoints of all attempts, furthest step first, then newest attempt."""
    found = [path for path in run.glob("a*/checkpoints/step-*") if path.is_dir() and _order(path) is not None]
    return sorted(found, key=lambda path: _order(path) or (0, 0), reverse=True)


def verify(path: Path, config_digest: str, world_size: int, required: Collection[str] = ()) -> Found:
    """The checkpoint at ``path`` if every byte is as published and it fits this run, else ``CheckpointRefused``."""
    manifest = read_manifest(path)
    if manifest.config_digest != config_digest:
        raise CheckpointRefused(f"written under config {manifest.config_digest}, this run has {config_digest}")
    if manifest.world_size != world_size:
        raise CheckpointRefused(f"written by {manifest.world_size} ranks, this attempt has {world_size}")
    present = {*manifest.components, *(entry.component for entry in manifest.files.values())}
    for name in sorted(set(required) - present):
        raise CheckpointRefused(f"component '{name}' is missing from the manifest")
    for relative, entry in sorted(manifest.files.items()):
        _check_file(path / relative, relative, entry)
    return Found(path, manifest)


def newest_verified(
    run: Path, config_digest: str, world_size: int, required: Collection[str] = ()
) -> tuple[Found | None, tuple[SkippedCheckpoint, ...]]:
    """The furthest checkpoint of any attempt that verifies, and those passed over on the way, with reasons."""
    skipped: list[SkippedCheckpoint] = []
    for path in published(run):
        try:
            return verify(path, config_digest, world_size, required), tuple(skipped)
        except CheckpointRefused as refusal:
            step = (_order(path) or (0, 0))[0]
            skipped.append(SkippedCheckpoint(path=str(path), step=step, reason=str(refusal)))
    return None, tuple(skipped)


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
            for leftover in (attempt_folder(run, attempt) / "checkpoints").glob(".*"):
                shutil.rmtree(leftover)  # a save that was killed: never published
        world.barrier()

    def save(self, step: int, components: Mapping[str, Component]) -> CheckpointRecord:
        """Publishes all components as one checkpoint, then prunes. Raises OSError (disk full, ...) unpublished."""
        final = checkpoint_path(self._run, self._attempt, step)
        aside = final.with_name(f".{final.name}.writing")
        if self._world.is_main:
            for name in components:
                (aside / name).mkdir(parents=True)
        self._world.barrier()
        for name, component in components.items():
            component.save(aside / name)
        self._world.barrier()
        files = self._hash_files(aside)
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
            )
        )
        if self._world.is_main:
            _publish(aside, final, manifest)
            self._prune(final)
        self._world.barrier()
        return Found(final, manifest).record

    def find(self, required: Collection[str]) -> tuple[Found | None, tuple[SkippedCheckpoint, ...]]:
        """``newest_verified`` judged once, by rank 0, for all ranks."""
        answer = None
        if self._world.is_main:
            answer = newest_verified(self._run, self._config_digest, self._world.size, required)
        found = self._world.broadcast(answer)
        assert found is not None  # rank 0 always answers
        return found

    def load(self, found: Found, components: Mapping[str, Component]) -> None:
        for name, component in components.items():
            component.load(found.path / name)

    def _hash_files(self, folder: Path) -> dict[str, FileEntry]:
        """Syncs and hashes all files, shared out over the ranks."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = {
            path.relative_to(folder).as_posix(): _sync_and_hash(path, folder)
            for path in paths[self._world.rank :: self._world.size]
        }
        return dict(sorted(item for part in self._world.gather(mine) for item in part.items()))

    def _prune(self, just_published: Path) -> None:
        """Deletes what is older than the ``keep_last`` newest checkpoints that verify, of this and older attempts.

        A checkpoint that does not verify never counts as kept, so the only good one is never deleted.
        """
        kept = 0
        for path in published(self._run):
            if path.parent.parent.name != f"a{self._attempt}" and (_order(path) or (0, 0))[1] > self._attempt:
                continue
            if kept >= self._keep_last:
                doomed = path.with_name(f".{path.name}.deleted")
                path.rename(doomed)  # first, so that a kill in between leaves no half checkpoint
                shutil.rmtree(doomed)
            elif path == just_published or self._verifies(path):
                kept += 1

    def _verifies(self, path: Path) -> bool:
        try:
            verify(path, self._config_digest, self._world.size)
        except CheckpointRefused:
            return False
        return True


def _order(path: Path) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder, None when its name is not one."""
    step, attempt = path.name.removeprefix("step-"), path.parent.parent.name.removeprefix("a")
    return (int(step), int(attempt)) if step.isdigit() and attempt.isdigit() else None


def read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointRefused(f"component 'manifest' cannot be read: {error}") from error
    except ValidationError as error:
        raise CheckpointRefused(f"component 'manifest' is altered: {error.error_count()} invalid fields") from error
    if manifest.version != FORMAT_VERSION:
        raise CheckpointRefused(f"format version {manifest.version}, this trainer reads {FORMAT_VERSION}")
    return manifest


def _check_file(path: Path, relative: str, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
        digest = file_digest(path) if size == entry.size else ""
    except OSError as error:
        raise CheckpointRefused(f"component '{entry.component}': {relative} is missing ({error.strerror})") from error
    if size != entry.size:
        raise CheckpointRefused(f"component '{entry.component}': {relative} has {size} bytes, not {entry.size}")
    if digest != entry.sha256:
        raise CheckpointRefused(f"component '{entry.component}': {relative} is altered (sha256 differs)")


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


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
