"""What a complete, verifiable checkpoint is, and finding the one to resume from. No torch: the launcher reads it too.

    <run>/a<attempt>/checkpoints/step-<8 digits>/<component>/...   plus manifest.json: a sha256 for every file

A checkpoint is a set of named components (engine, random state, data position, KL controller, ...). It is written
aside, synced, given its manifest and then renamed, so a folder called ``step-*`` is whole; a manifest that does not
match (disk fault, meddling) makes the resume fall back to the checkpoint before, and say so. An attempt writes only
below its own folder, so a partitioned old attempt cannot spoil a newer one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import ValidationError

from rlhf_trainer.digests import MANIFEST, file_digest
from rlhf_trainer.wire import CheckpointRecord, SkippedCheckpoint, Wire, digest_of

FORMAT_VERSION = 2


@runtime_checkable
class Component(Protocol):
    """A part of the training state. Called on every rank at the same time; collectives are allowed.

    What it writes is equal for every number of ranks, unless it is ``Sharded`` too.
    """

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@runtime_checkable
class Sharded(Component, Protocol):
    """A component whose files depend on the number of ranks that wrote them."""

    def load_resharded(self, folder: Path, scratch: Path, alive: Callable[[], None]) -> None:
        """Restores what another number of ranks wrote. ``folder`` is only read; ``scratch`` is an empty folder of this
        attempt, deleted afterwards; ``alive`` is to be called on all ranks during long work."""
        ...


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
    seal: str = ""  # over all other fields: an entry that was taken out is missed

    def digest(self) -> str:
        """Identity of the content: time and attempt excluded."""
        return digest_of({path: entry.sha256 for path, entry in self.files.items()})

    def sealed(self) -> Manifest:
        return self.model_copy(update={"seal": self.expected_seal()})

    def expected_seal(self) -> str:
        return digest_of(self.model_dump(mode="json", exclude={"seal"}))


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

    def taken_by(self, ranks: int) -> CheckpointRecord:
        """The record as an attempt of ``ranks`` ranks resumes from it: it says whether the state was converted."""
        written_by = self.manifest.world_size
        return self.record.model_copy(update={"converted_from": written_by if written_by != ranks else None})


def attempt_folder(run: Path, attempt: int) -> Path:
    return run / f"a{attempt}"


def checkpoint_path(run: Path, attempt: int, step: int) -> Path:
    return attempt_folder(run, attempt) / "checkpoints" / f"step-{step:08d}"


def published(run: Path) -> list[Path]:
    """Published checkpoints of all attempts, furthest step first, then newest attempt."""
    found = [path for path in run.glob("a*/checkpoints/step-*") if path.is_dir() and step_and_attempt(path) is not None]
    return sorted(found, key=lambda path: step_and_attempt(path) or (0, 0), reverse=True)


def verify(path: Path, config_digest: str, required: Collection[str] = ()) -> Found:
    """The checkpoint at ``path`` if every byte is as published and it fits this run, else ``CheckpointRefused``.

    The number of ranks is no part of the fit: sharded components are converted. The ZeRO stage is, as part of the
    configuration, so a run cannot change it.
    """
    manifest = read_manifest(path)
    if manifest.config_digest != config_digest:
        raise CheckpointRefused(f"written under config {manifest.config_digest}, this run has {config_digest}")
    present = {*manifest.components, *(entry.component for entry in manifest.files.values())}
    for name in sorted(set(required) - present):
        raise CheckpointRefused(f"component '{name}' is missing from the manifest")
    for relative, entry in sorted(manifest.files.items()):
        _check_file(path / relative, relative, entry)
    return Found(path, manifest)


def newest_verified(
    run: Path, config_digest: str, required: Collection[str] = ()
) -> tuple[Found | None, tuple[SkippedCheckpoint, ...]]:
    """The furthest checkpoint of any attempt that verifies, and those passed over on the way, with reasons."""
    skipped: list[SkippedCheckpoint] = []
    for path in published(run):
        try:
            return verify(path, config_digest, required), tuple(skipped)
        except CheckpointRefused as refusal:
            step = (step_and_attempt(path) or (0, 0))[0]
            skipped.append(SkippedCheckpoint(path=str(path), step=step, reason=str(refusal)))
    return None, tuple(skipped)


def step_and_attempt(path: Path) -> tuple[int, int] | None:
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
    if manifest.seal != manifest.expected_seal():
        raise CheckpointRefused("component 'manifest' is altered (its seal does not match)")
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


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
