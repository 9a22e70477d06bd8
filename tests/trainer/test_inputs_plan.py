"""Which objects make up an input, where each belongs on disk, and in which parts it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_trainer.exits import Invalid
from rlhf_trainer.inputs import as_written
from rlhf_trainer.inputs.plan import Stored, in_words, parts_of, targets
from rlhf_trainer.wire import Located
from tests.trainer.training_world import TinyWorld

ROOT = Path("/scratch/sft")
URI = "s3://models/desk/sft"


def placed(*objects: tuple[str, int]) -> dict[str, int]:
    found = targets(URI, "desk/sft", [Stored(key, size) for key, size in objects], ROOT)
    return {str(target.relative_to(ROOT)): stored.size for target, stored in found.items()}


def test_keys_become_files_below_the_folder() -> None:
    assert placed(("desk/sft/config.json", 3), ("desk/sft/a/b c.bin", 9), ("desk/sft/.hidden", 0)) == {
        "config.json": 3,
        "a/b c.bin": 9,
        ".hidden": 0,
    }


def test_what_a_console_makes_to_show_a_folder_is_no_file() -> None:
    assert placed(("desk/sft", 0), ("desk/sft/a", 0), ("desk/sft/a/b", 1)) == {"a/b": 1}


@pytest.mark.parametrize(
    "key",
    [
        "desk/sft/../../../etc/passwd",
        "desk/sft/..",
        "desk/sft/./x",
        "desk/sft//etc/passwd",
        "desk/sft/a/",
        "desk/sft/a\0b",
        "desk/sft-other/x",
        "/etc/passwd",
    ],
)
def test_a_key_that_leads_elsewhere_is_refused(key: str) -> None:
    with pytest.raises(Invalid) as refused:
        placed(("desk/sft/good", 1), (key, 1))
    assert refused.value.message.startswith(f"{URI}: the key {key!r} is no path below it")


def test_an_object_that_is_a_folder_too_is_refused() -> None:
    with pytest.raises(Invalid, match="'desk/sft/a' is an object and a folder of others"):
        placed(("desk/sft/a", 2), ("desk/sft/a/b", 1))


def test_parts_cover_every_byte_once_and_in_order() -> None:
    found = {ROOT / name: Stored(name, size) for name, size in (("a", 0), ("b", 10), ("c", 25))}
    parts = [(part.stored.key, part.start, part.end) for part in parts_of(found, 10)]
    assert parts == [("b", 0, 10), ("c", 0, 10), ("c", 10, 20), ("c", 20, 25)]


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (2560, "2.5 KiB"), (3 << 39, "1536 GiB")]
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words


def test_a_message_speaks_of_what_the_user_wrote(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = tiny_world.config(
        tmp_path,
        base_model=Located(path="/mnt/scratch/x", uri="s3://models/sft"),
        preferences=Located(path="/mnt/scratch/x/p.jsonl", uri="pvc://feedback/p.jsonl"),
    )
    told = as_written("spec.preferences: /mnt/scratch/x/p.jsonl:7: no; /mnt/scratch/x/config.json: neither", config)
    assert told == "spec.preferences: pvc://feedback/p.jsonl:7: no; s3://models/sft/config.json: neither"
