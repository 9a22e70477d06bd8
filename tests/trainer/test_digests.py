"""The three digests: what they ignore, what they notice."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trainer.digests import (
    DigestMismatchError,
    RowError,
    check_digest,
    dataset_digest,
    file_digest,
    folder_digest,
    rows_digest,
)

ROWS = st.lists(
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=8), st.integers(-5, 5), st.booleans()), max_size=4),
    max_size=8,
)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_file_digest_is_plain_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1_000_000)
    assert file_digest(path) == "sha256:" + hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_folder_digest_follows_its_definition(tmp_path: Path) -> None:
    (tmp_path / "members" / "0").mkdir(parents=True)
    (tmp_path / "members" / "0" / "w").write_bytes(b"w")
    (tmp_path / "config.json").write_bytes(b"{}")
    lines = f"config.json\0{file_digest(tmp_path / 'config.json')}\n"
    lines += f"members/0/w\0{file_digest(tmp_path / 'members/0/w')}\n"
    assert folder_digest(tmp_path) == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def test_folder_digest_ignores_only_the_top_manifest(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"w")
    before = folder_digest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert folder_digest(tmp_path) == before
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "manifest.json").write_text("{}")
    assert folder_digest(tmp_path) != before


@pytest.mark.parametrize("change", ["content", "rename", "extra", "missing"])
def test_folder_digest_notices(tmp_path: Path, change: str) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    before = folder_digest(tmp_path)
    match change:
        case "content":
            (tmp_path / "a").write_bytes(b"3")
        case "rename":
            (tmp_path / "a").rename(tmp_path / "c")
        case "extra":
            (tmp_path / "c").write_bytes(b"")
        case _:
            (tmp_path / "b").unlink()
    assert folder_digest(tmp_path) != before


def test_folder_digest_refuses_nothing_to_hash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file"):
        folder_digest(tmp_path)
    with pytest.raises(NotADirectoryError, match="not a folder"):
        folder_digest(tmp_path / "absent")


@given(rows=ROWS, seed=st.integers(0, 1000))
def test_dataset_digest_is_order_and_layout_free(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    reordered = [dict(reversed(list(row.items()))) for row in shuffled]
    expected = dataset_digest(write_rows(folder / "a", rows))
    assert dataset_digest(write_rows(folder / "b", reordered)) == expected == rows_digest(reordered)


def test_dataset_digest_counts_repeated_rows_and_notices_edits(tmp_path: Path) -> None:
    one = dataset_digest(write_rows(tmp_path / "a", [{"x": 1}]))
    two = dataset_digest(write_rows(tmp_path / "b", [{"x": 1}, {"x": 1}]))
    other = dataset_digest(write_rows(tmp_path / "c", [{"x": "1"}]))
    assert len({one, two, other}) == 3


@pytest.mark.parametrize("line", ["[1]", "{", '{"x": NaN}', "7"])
def test_dataset_digest_names_the_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"ok": 1}\n\n' + line + "\n")
    with pytest.raises(RowError, match=r"data\.jsonl:3: "):
        dataset_digest(path)


def test_check_digest_says_what_to_do() -> None:
    check_digest("sha256:a", "sha256:a", "model /m")
    with pytest.raises(DigestMismatchError, match=r"model /m hashes to sha256:b.*pin the new digest"):
        check_digest("sha256:b", "sha256:a", "model /m")
