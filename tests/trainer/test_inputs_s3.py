"""Attempts that read their inputs from a real S3 server, and every way in which that goes wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from rlhf_trainer import launch
from rlhf_trainer.data.access import may_pass, write_bytes
from rlhf_trainer.digests import dataset_digest, file_digest, folder_digest
from rlhf_trainer.exits import Ended, Invalid, NoSpace, StoreUnavailable
from rlhf_trainer.inputs import Input
from rlhf_trainer.inputs import fetch as fetching
from rlhf_trainer.inputs.fetch import fetch
from rlhf_trainer.wire import AttemptConfig, FailureClass, Located, Result
from tests.trainer.attempts import run_here
from tests.trainer.credentials_agent import credentials_agent
from tests.trainer.s3_server import S3Server
from tests.trainer.store_faults import faulty
from tests.trainer.training_world import TinyWorld, launched

PROMPT_SECONDS = 10.0  # of an end that is asked for; a request may take a minute


def put(source: Path, uri: str) -> None:
    """A file, or a folder with all that is in it."""
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            write_bytes(f"{uri}/{path.relative_to(source)}".removesuffix("/."), path.read_bytes())


def stored(server: S3Server, key: str, folder: Path, digest: str | None = None) -> Located:
    return Located(path=str(folder / Path(key).name), uri=f"s3://{server.bucket}/{key}", digest=digest)


def preferences(located: Located) -> list[Input]:
    return [Input("preferences", located, file_digest)]


def of_the_store(server: S3Server, world: TinyWorld, folder: Path, **changes: Located) -> AttemptConfig:
    """The tiny attempt, with both of its inputs in the store."""
    put(world.base, f"s3://{server.bucket}/models/sft")
    put(world.preferences, f"s3://{server.bucket}/desk/v1.jsonl")
    inputs = {
        "base_model": stored(server, "models/sft", folder, folder_digest(world.base)),
        "preferences": stored(server, "desk/v1.jsonl", folder, dataset_digest(world.preferences)),
    }
    return world.config(folder / "out", **{**inputs, **changes})


def test_an_attempt_from_the_store_ends_as_one_from_the_disk(
    reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    with launched(of_the_store(reachable, tiny_world, tmp_path / "scratch"), tmp_path / "launch") as attempt:
        assert attempt.wait() == 0, attempt.output()
        log = attempt.output()
    local = run_here(tiny_world.config(tmp_path / "local"))
    result = attempt.message()
    assert local.artifact is not None
    assert result.artifact is not None
    assert result.artifact.digest == local.artifact.digest
    assert result.lineage == local.lineage
    files = sum(1 for path in tiny_world.base.iterdir())
    assert f"spec.baseModel (s3://feedback/models/sft): {files} objects" in log
    assert "inputs: loaded" in log
    assert not list((tmp_path / "scratch").glob("*.partial"))


def test_attempts_whose_inputs_cannot_be_had(reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Started together; none of them comes to start a rank. The third is of a pod that is not the first."""
    address = f"s3://{reachable.bucket}"
    altered = stored(reachable, "desk/v1.jsonl", tmp_path / "3", digest="sha256:" + "0" * 64)
    configs = {
        "missing": of_the_store(
            reachable, tiny_world, tmp_path / "1", preferences=stored(reachable, "desk/v2.jsonl", tmp_path / "1")
        ),
        "wrong secret": of_the_store(reachable, tiny_world, tmp_path / "2"),
        "altered": of_the_store(reachable, tiny_world, tmp_path / "3", preferences=altered),
    }
    environments = {"wrong secret": {"AWS_SECRET_ACCESS_KEY": "mistaken"}, "altered": {"PET_NODE_RANK": "1"}}
    with ExitStack() as stack:
        launches = {
            name: stack.enter_context(
                launched(config, tmp_path / f"launch {name}", environment=environments.get(name, {}))
            )
            for name, config in configs.items()
        }
        codes = {name: attempt.wait() for name, attempt in launches.items()}
        logs = {name: attempt.output() for name, attempt in launches.items()}
    assert codes == {"missing": 11, "wrong secret": 11, "altered": 11}, logs
    told = {name: attempt.message() for name, attempt in launches.items()}
    assert told["missing"].message == (
        f"spec.preferences ({address}/desk/v2.jsonl): there is no such object, nor any below it; check bucket and "
        "key, spec.objectStore and its Secret"
    )
    assert told["wrong secret"].message.startswith(f"spec.baseModel ({address}/models/sft): cannot be read (")
    assert "403 Forbidden" in told["wrong secret"].message
    assert told["altered"].reason == "DigestMismatch"
    assert f"spec.preferences ({address}/desk/v1.jsonl) hashes to sha256:" in told["altered"].message
    for name, text in logs.items():
        assert "\n" not in told[name].message
        assert "desk-secret" not in text + told[name].message
        assert "mistaken" not in text + told[name].message


def in_this_process(config: AttemptConfig, folder: Path) -> Result:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return launch.launch(config, folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_store_out_of_reach_ends_as_what_is_tried_again(
    reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_the_store(reachable, tiny_world, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(launch, "fetch", partial(fetch, patience=0.6))
    result = in_this_process(config, tmp_path)
    assert (result.failure_class, result.reason) == (FailureClass.UNKNOWN, "ObjectStoreUnavailable")
    assert result.exit_code == 1
    assert "spec.baseModel (s3://feedback/models/sft): no answer for 1 s (" in result.message
    assert "check the network, bucket and key, spec.objectStore and its Secret" in result.message


def test_sigterm_ends_a_download_at_once(reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = of_the_store(reachable, tiny_world, tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with launched(config, tmp_path / "launch", environment=endpoint) as attempt:
            connection, _ = silent.accept()  # the first request is on its way, and nobody will answer it
            with connection:
                attempt.process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                assert attempt.wait() == 20, attempt.output()
    assert time.monotonic() - began < PROMPT_SECONDS
    assert "SIGTERM while the inputs were being loaded" in attempt.message().message


def test_the_exit_code_does_not_hang_on_how_the_interpreter_shuts_down(
    reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """A thread of the client that lets go of a Python object at that moment aborts the process (one in some hundred);
    here something else that runs at that moment decides the code."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os._exit, 99)\n")
    absent = stored(reachable, "absent.jsonl", tmp_path)
    config = of_the_store(reachable, tiny_world, tmp_path / "scratch", preferences=absent)
    environment = {"PYTHONPATH": str(tmp_path)}
    with launched(config, tmp_path / "launch", environment=environment) as attempt:
        assert attempt.wait() == 11, attempt.output()


def test_pods_that_load_slowly_are_waited_for_longer(
    reachable: S3Server, tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two pods, whose store was busy for 1.5 s; the second never comes."""
    located = stored(reachable, "desk/v1.jsonl", tmp_path)
    put(tiny_world.preferences, f"s3://{reachable.bucket}/desk/v1.jsonl")
    config = tiny_world.config(tmp_path / "out", 2, preferences=located, rendezvous_seconds=1)
    with faulty(reachable.environment["AWS_ENDPOINT_URL"], ["busy", "busy"]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with launched(config, tmp_path / "launch", nodes=2) as attempt:
            assert attempt.wait() == 21, attempt.output()
    limit = re.search(r"the 2 ranks did not meet within (\d+) s", attempt.message().message)
    assert limit is not None
    assert int(limit[1]) >= 2


def test_credentials_that_have_run_out_do_not_end_a_run_that_had_them(
    reachable: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = stored(reachable, "desk/once", tmp_path)
    write_bytes(f"s3://{reachable.bucket}/desk/once", b"here")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "rotated")
    with pytest.raises(Invalid, match=r"cannot be read \(.*403 Forbidden: SignatureDoesNotMatch\)"):
        fetch(preferences(located))
    with pytest.raises(StoreUnavailable, match="403 Forbidden: SignatureDoesNotMatch"):
        fetch(preferences(located), again=True)
    missing = stored(reachable, "desk/never", tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", reachable.environment["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(Invalid, match="there is no such object"):
        fetch(preferences(missing), again=True)


def test_a_folder_may_be_read_by_who_may_list_it_alone(
    reachable: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where listing is granted for what lies below a prefix, asking for the folder's own name is answered by 403."""
    write_bytes(f"s3://{reachable.bucket}/models/sft/config.json", b"{}")
    server = reachable.environment["AWS_ENDPOINT_URL"]
    with faulty(server, ["forbidden"]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fetch(preferences(stored(reachable, "models/sft", tmp_path)))
    with faulty(server, ["forbidden"]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(Invalid, match=r"models/none\): cannot be read \(.*403 Forbidden"):
            fetch(preferences(stored(reachable, "models/none", tmp_path)))
    assert (tmp_path / "sft" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("non-2xx status code: 400 Bad Request: <Error><Code>Throttling</Code></Error>", True),
        ("non-2xx status code: 403 Forbidden: <Error><Code>SlowDown</Code></Error>", True),
        ("non-2xx status code: 403 Forbidden: <Error><Code>AccessDenied</Code></Error>", False),
        ("Received redirect without LOCATION, this normally indicates an incorrectly configured region", False),
        ("error sending request", True),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(text: str, passes: bool) -> None:
    assert may_pass(Exception(f"Generic S3 error: {text}")) is passes


def test_a_store_in_trouble_is_asked_again(
    reachable: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A busy answer, then a connection that is cut within the first part: the real server answers after these."""
    content = os.urandom(3 << 20)
    write_bytes(f"s3://{reachable.bucket}/big/a.bin", content)
    with faulty(reachable.environment["AWS_ENDPOINT_URL"], ["busy", "", "cut"]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fetch(preferences(stored(reachable, "big/a.bin", tmp_path)))
    assert (tmp_path / "a.bin").read_bytes() == content
    asked = [record.getMessage() for record in caplog.records if "asking again" in record.getMessage()]
    assert len(asked) == 2, asked
    assert "503" in asked[0]


def test_an_object_that_changes_while_it_is_read_is_not_made_of_two(
    reachable: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{reachable.bucket}/changing.bin"
    write_bytes(uri, b"a" * 1000)
    told = fetching.in_words

    def overwritten(size: float) -> str:
        write_bytes(uri, b"b" * 1000)
        return told(size)

    monkeypatch.setattr(fetching, "in_words", overwritten)  # called between the look and the first part
    with pytest.raises(StoreUnavailable, match="an object changed while it was being read"):
        fetch(preferences(stored(reachable, "changing.bin", tmp_path)))
    assert not (tmp_path / "changing.bin").exists()


def test_a_newer_object_takes_the_place_of_what_was_there(reachable: S3Server, tmp_path: Path) -> None:
    located = stored(reachable, "again", tmp_path)
    for content in (b"one", b"", b"three"):
        write_bytes(f"s3://{reachable.bucket}/again", content)
        fetch(preferences(located))
        assert (tmp_path / "again").read_bytes() == content


_MEASURE = """
import os, resource, sys
from rlhf_trainer.digests import file_digest
from rlhf_trainer.inputs import Input
from rlhf_trainer.inputs.fetch import fetch
from rlhf_trainer.wire import Located
fetch([Input("preferences", Located(path=sys.argv[2], uri=sys.argv[1]), file_digest)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
os._exit(0)
"""


def test_memory_does_not_grow_with_the_object(reachable: S3Server, tmp_path: Path) -> None:
    peaks = []
    for size in (1 << 20, 400 << 20):
        with sparse(reachable, "sparse.bin", size):
            command = [sys.executable, "-c", _MEASURE, f"s3://{reachable.bucket}/sparse.bin", str(tmp_path / "x")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "x").stat().st_size == size
            peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 150, peaks


@contextmanager
def sparse(server: S3Server, name: str, size: int) -> Iterator[None]:
    path = server.folder / name
    with path.open("wb") as file:
        file.truncate(size)
    yield
    path.unlink()


def test_too_little_room_is_said_before_the_first_byte(reachable: S3Server, tmp_path: Path) -> None:
    with (
        sparse(reachable, "huge.bin", 4 << 40),
        pytest.raises(NoSpace, match=r"^ENOSPC: the inputs need 4096 GiB at .* are free; mount a larger"),
    ):
        fetch(preferences(stored(reachable, "huge.bin", tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_and_one_that_is_closed() -> None:
    wanted = Input("preferences", Located(path="/scratch/x", uri="s3://b/x"), file_digest)
    with (
        pytest.raises(NoSpace, match=r"^ENOSPC: spec.preferences \(s3://b/x\) does not fit at /scratch/x; mount"),
        fetching._writing(wanted),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    with pytest.raises(Invalid, match="cannot be written"), fetching._writing(wanted):
        Path("/proc/version/x").mkdir(parents=True)
    with pytest.raises(Ended, match="cannot be written") as broken, fetching._writing(wanted):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # of this node's disk: another may do
    assert broken.value.failure_class is FailureClass.UNKNOWN


def test_nothing_to_fetch_asks_nobody(monkeypatch: pytest.MonkeyPatch, tiny_world: TinyWorld, tmp_path: Path) -> None:
    def asked(_name: str, _timeout: float) -> Sequence[object]:
        raise AssertionError("a job that reads claims alone opened a bucket")

    monkeypatch.setattr(fetching, "open_bucket", asked)
    launch.bring_inputs(tiny_world.config(tmp_path))


def test_without_keys_the_pod_has_those_of_its_service_account(
    reachable: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on EKS: an agent of the node gives credentials for the token of the service account."""
    write_bytes(f"s3://{reachable.bucket}/ambient", b"here")
    (tmp_path / "token").write_text("of-the-account")
    keys = {name: reachable.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in keys:
        monkeypatch.delenv(name)
    with credentials_agent("of-the-account", *keys.values()) as address:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        fetch(preferences(stored(reachable, "ambient", tmp_path)))
        assert (tmp_path / "ambient").read_bytes() == b"here"
        (tmp_path / "token").write_text("of-another")
        with pytest.raises(Invalid, match="cannot be read"):
            fetch(preferences(stored(reachable, "ambient", tmp_path)))
