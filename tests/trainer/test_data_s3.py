"""Data behind s3:// addresses, on a real server that checks signatures; and addresses that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_trainer.__main__ import main
from rlhf_trainer.data.access import read_bytes, write_bytes
from rlhf_trainer.digests import dataset_digest
from rlhf_trainer.exits import Invalid
from tests.trainer import s3_server
from tests.trainer.data_world import rows_by


def test_an_object_comes_back_as_it_was_written(reachable: s3_server.S3Server) -> None:
    content = os.urandom(3_000_000)
    write_bytes(f"s3://{reachable.bucket}/deep/er/a.bin", content)
    assert read_bytes(f"s3://{reachable.bucket}/deep/er/a.bin") == content
    assert (reachable.folder / "deep/er/a.bin").read_bytes() == content
    write_bytes(f"s3://{reachable.bucket}/deep/er/a.bin", b"newer")
    assert read_bytes(f"s3://{reachable.bucket}/deep/er/a.bin") == b"newer"


@pytest.mark.parametrize(
    ("address", "changes", "says"),
    [
        ("s3://feedback/absent.jsonl", {}, "not found"),
        ("s3://no-such-bucket/x", {}, "404"),
        ("s3://feedback/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "403 Forbidden"),
        ("s3://feedback/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "error sending request"),
    ],
)
def test_what_cannot_be_read_is_said_with_what_to_check(
    reachable: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch, address: str, changes: dict[str, str], says: str
) -> None:
    write_bytes(f"s3://{reachable.bucket}/x", b"here")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Invalid) as refused:
        read_bytes(address)
    assert refused.value.message.startswith(f"{address}: cannot be read")
    assert says in refused.value.message
    assert "check the bucket, AWS_ENDPOINT_URL and the AWS_* credentials" in refused.value.message
    assert "desk-secret" not in refused.value.message


def test_the_four_commands_work_on_a_bucket(
    reachable: s3_server.S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_by({f"r{at}": 0.9 for at in range(4)}, pairs=60, labels=2)
    export = "".join(json.dumps(row) + "\n" for row in rows).encode()
    address, out = (f"s3://{reachable.bucket}/{name}.jsonl" for name in ("export", "v1"))
    write_bytes(address, export)
    assert main(["data", "import", address, "--out", out, "--keep-rater-ids"]) == 0
    for command in (["validate", out], ["report", out], ["diff", out, out]):
        assert main(["data", *command]) == 0
    capsys.readouterr()
    manifest = json.loads(read_bytes(f"{out}.manifest.json"))
    local = tmp_path / "v1.jsonl"
    local.write_bytes(read_bytes(out))
    assert manifest["datasetDigest"] == dataset_digest(local)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://key:secret@bucket/x", "the address holds credentials"),
        ("s3://bucket/x?X-Amz-Signature=1", "no '?' or '#'"),
        ("s3://bucket", "name both"),
        ("s3:///x", "name both"),
        ("s3://bucket/../x", "must not hold '..'"),
        ("file:///a/../b", "must not hold '..'"),
        ("pvc://claim/x", "give the path where it is mounted"),
        ("http://example.org/x", "scheme 'http' is not accepted"),
        ("gs://bucket/x", "use a path, file:// or s3://"),
        ("", "cannot be read"),
        ("/nowhere/at/all", "No such file or directory"),
    ],
)
def test_a_bad_address_is_refused(address: str, says: str) -> None:
    with pytest.raises(Invalid) as refused:
        read_bytes(address)
    assert says in refused.value.message
    assert "secret" not in refused.value.message


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.jsonl"
    write_bytes(f"file://{target}", b"one")
    write_bytes(str(target), b"two")
    assert read_bytes(f"file://{target}") == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["x.jsonl"]
    with pytest.raises(Invalid, match="cannot be written"):
        write_bytes(str(tmp_path / "new"), b"a folder is in the way")
