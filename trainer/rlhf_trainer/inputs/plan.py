"""Which objects make up an input, where each belongs on disk, and in which parts it is read. Pure.

A path names one object, or a folder: all objects whose keys go on from it after a ``/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rlhf_trainer.exits import Invalid

PART_BYTES = 8 << 20


@dataclass(frozen=True)
class Stored:
    """One object, as the store describes it. ``e_tag`` is of its content; "" if the store gives none."""

    key: str
    size: int
    e_tag: str = ""


@dataclass(frozen=True)
class Part:
    """The bytes from ``start`` to before ``end`` of an object, and the file that they belong in."""

    stored: Stored
    target: Path
    start: int
    end: int


def targets(uri: str, prefix: str, listed: Iterable[Stored], folder: Path) -> dict[Path, Stored]:
    """The file of each object below ``prefix``. Raises Invalid for a key that leads elsewhere, or to no place."""
    found = {folder / _below(uri, prefix, stored.key): stored for stored in listed if stored.key != prefix}
    parents = {parent for target in found for parent in target.parents} & set(found)
    if real := sorted(found[parent].key for parent in parents if found[parent].size):
        raise Invalid(f"{uri}: {real[0]!r} is an object and a folder of others, as no file can be; rename it")
    # An empty object with others below it is what a console makes to show a folder.
    return {target: stored for target, stored in found.items() if target not in parents}


def _below(uri: str, prefix: str, key: str) -> PurePosixPath:
    rest = key.removeprefix(f"{prefix}/")
    parts = rest.split("/")
    if rest == key or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise Invalid(f"{uri}: the key {key!r} is no path below it; rename the object")
    return PurePosixPath(*parts)


def parts_of(found: dict[Path, Stored], size: int = PART_BYTES) -> Iterator[Part]:
    """In order, so that a disk is written and a store is read from front to back."""
    for target, stored in found.items():
        for start in range(0, stored.size, size):
            yield Part(stored, target, start, min(start + size, stored.size))


def in_words(size: float) -> str:
    """2.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
