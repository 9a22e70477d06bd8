"""Identity of what goes in and out of a run: three digests with three names. No torch.

* `file_digest`: sha256 over the bytes of one file.
* `folder_digest`: sha256 over the sorted lines ``<relative path>\\0<file digest>\\n`` of every file below a folder.
  The top-level ``manifest.json`` is left out, because it carries time and attempt, and so must not be identity.
* `dataset_digest`: sha256 over the sorted digests of the rows of a JSONL file. Order-free (a shuffled export is the
  same data) and layout-free (key order and spaces do not matter), but a repeated row counts as often as it is there.

All are written ``sha256:<64 hex digits>``.
"""

from __future__ import annotations

import hashlib
import json
import math
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any, NoReturn

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class RowError(ValueError):
    """A line of a JSONL file that is not one JSON object; the message names file and line."""


class DigestMismatchError(ValueError):
    """Something under an unchanged name is not what was pinned."""


def file_digest(path: Path | str) -> str:
    """Digest of one file's bytes. Raises OSError when it cannot be read."""
    hasher = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


def folder_files(folder: Path | str) -> tuple[Path, ...]:
    """The files that make up a folder's identity, relative to it, sorted by their UTF-8 path.

    Links to files are followed (a model hub's cache is made of them); links to folders are not.
    Raises NotADirectoryError when `folder` is not a folder and ValueError when there is no file in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder: a folder digest needs one")
    found = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    files = sorted((path for path in found if path != Path(MANIFEST)), key=lambda path: path.as_posix().encode())
    if not files:
        raise ValueError(f"{root} holds no file besides {MANIFEST}: check the path")
    return tuple(files)


def folder_digest(folder: Path | str) -> str:
    """Digest of a folder's content and layout. Raises as `folder_files`, or OSError for an unreadable file."""
    root = Path(folder)
    hasher = hashlib.sha256()
    for path in folder_files(root):
        hasher.update(path.as_posix().encode() + b"\0" + file_digest(root / path).encode() + b"\n")
    return f"sha256:{hasher.hexdigest()}"


def row_digest(row: dict[str, Any]) -> bytes:
    """The 32 bytes of sha256 over a row's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def rows_digest(rows: list[dict[str, Any]]) -> str:
    """Digest of rows already in memory: equals `dataset_digest` of the file that holds them."""
    return _combine([row_digest(row) for row in rows])


def dataset_digest(path: Path | str) -> str:
    """Digest of a JSONL file's rows; blank lines and a byte order mark do not count.

    Raises RowError for a line that is not a JSON object (NaN and infinities are not JSON), OSError when unreadable.
    """
    digests: list[bytes] = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if line.strip():
                digests.append(row_digest(_parse_row(line, path, number)))
    return _combine(digests)


def check_digest(actual: str, expected: str, what: str) -> None:
    """Raise DigestMismatchError unless the two are equal; `what` names the thing and where it lies."""
    if actual != expected:
        raise DigestMismatchError(
            f"{what} hashes to {actual}, but {expected} is pinned: the content changed under an unchanged name. "
            "Restore it, or pin the new digest on purpose."
        )


def _combine(digests: list[bytes]) -> str:
    hasher = hashlib.sha256()
    for digest in sorted(digests):
        hasher.update(digest.hex().encode() + b"\n")
    return f"sha256:{hasher.hexdigest()}"


def _parse_row(line: bytes, path: Path | str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{path}:{number}: not a JSON object in UTF-8 ({error}); each line must be one") from error
    if not isinstance(row, dict):
        raise RowError(f"{path}:{number}: a JSON {type(row).__name__}, but each line must be one JSON object")
    return row


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
