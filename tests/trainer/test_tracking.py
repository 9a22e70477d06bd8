"""Trackers: what they are told is read back from the real thing, and dead or slow ones cost training nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.config import Tracker as Choice
from rlhf_trainer.config import Tracking
from rlhf_trainer.tracking.background import Background
from rlhf_trainer.tracking.base import Dataset, RunInfo, flatten
from rlhf_trainer.tracking.factory import open_tracker
from rlhf_trainer.tracking.tensorboard import safe_folder
from rlhf_trainer.wire import Artifact, AttemptConfig, FailureClass
from tests.trainer.training_world import TinyWorld, free_port, run_ranks, training_of

ROOT = Path(__file__).resolve().parents[2]
SERVER_VENV = ROOT / ".build" / "mlflow-server"
REQUIREMENTS = Path(__file__).with_name("mlflow-server.txt")

# One short attempt after the other on two ranks; each says what it had on its board when it ended.
SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt
os.environ["RLHF_STATUS_PORT"] = "0"
world = join(timedelta(seconds=600))
for path in sys.argv[1:]:
    config = AttemptConfig.model_validate_json(Path(path).read_bytes())
    result = run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), StopSignal())
    if world.is_main:
        Path(path).with_suffix(".result").write_text(result.to_json())
leave()
"""


class Recorder:
    """A tracker in memory. ``delay`` makes every call slow, ``broken`` names the calls that raise."""

    def __init__(self, delay: float = 0.0, broken: frozenset[str] = frozenset()) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.delay, self.broken = delay, set(broken)

    def _record(self, name: str, *arguments: Any) -> None:
        time.sleep(self.delay)
        if name in self.broken:
            raise ConnectionError(f"{name}: nobody listens")
        self.calls.append((name, *arguments))

    def start(self, run: RunInfo) -> None:
        self._record("start", run.title)

    def params(self, values: Mapping[str, str]) -> None:
        self._record("params", dict(values))

    def dataset(self, dataset: Dataset) -> None:
        self._record("dataset", dataset.name)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._record("metrics", step, dict(values))

    def artifact(self, path: str, digest: str) -> None:
        self._record("artifact", path, digest)

    def finish(self, succeeded: bool, reason: str, message: str) -> None:
        self._record("finish", succeeded, reason, message)


def info(folder: Path, project: str = "desk") -> RunInfo:
    return RunInfo(project, "default", "tiny", "uid-7", 2, "RewardModelJob", folder)


def tell(tracker: Background, folder: Path, steps: int = 3) -> None:
    tracker.start(info(folder))
    tracker.params({"kl.target": "6.0", **{f"field{index}": "x" * 30 for index in range(150)}})
    tracker.dataset(Dataset("preferences", "pvc://feedback/desk.jsonl", "sha256:" + "a" * 64))
    for step in range(1, steps + 1):
        tracker.metrics(step, {"loss": 1.0 / step, "kl": 0.5 * step})
    tracker.artifact("/out/a2/artifact", "sha256:" + "b" * 64)
    tracker.finish(True, "Succeeded", "2 of 2 verdicts pass")


def test_events_arrive_once_and_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    tell(Background(lambda: recorder), tmp_path)
    names = [call[0] for call in recorder.calls]
    assert names == ["start", "params", "dataset", *["metrics"] * 3, "artifact", "finish"]
    assert recorder.calls[0] == ("start", "default/tiny/a2")


def test_a_slow_tracker_never_holds_up_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand steps against a tracker of 50 ms a call: the steps do not wait, the end only its few seconds."""
    tracker = Background(lambda: Recorder(delay=0.05), capacity=10, finish_seconds=0.3)
    tracker.start(info(tmp_path))
    began = time.monotonic()
    for step in range(1000):
        tracker.metrics(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0, "50 s if it waited"
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker.finish(True, "Succeeded", "")
    assert time.monotonic() - began < 2.0
    assert tracker.dropped > 900
    assert "did not keep up" in caplog.text


def test_every_kind_of_error_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(broken=frozenset({"metrics", "artifact"}))
    with caplog.at_level(logging.WARNING):
        tell(Background(lambda: recorder), tmp_path, steps=50)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" failed")[0] for line in lines] == ["tracking metrics", "tracking artifact"]
    assert recorder.calls[-1][0] == "finish"


def test_a_tracker_that_comes_up_late_still_learns_how_the_run_began(tmp_path: Path) -> None:
    recorder = Recorder(broken=frozenset({"start"}))
    tracker = Background(lambda: recorder, retry_seconds=0.0)
    tracker.start(info(tmp_path))
    tracker.params({"seed": "3"})
    tracker.metrics(1, {"loss": 1.0})
    while tracker._queue.qsize():
        time.sleep(0.01)
    time.sleep(0.05)
    recorder.broken.clear()
    tracker.metrics(2, {"loss": 0.5})
    tracker.finish(True, "Succeeded", "")
    assert [call[0] for call in recorder.calls] == ["start", "params", "metrics", "finish"]
    assert recorder.calls[2][1] == 2


def test_a_missing_client_is_logged_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Recorder:
        raise ModuleNotFoundError("No module named 'mlflow'")

    with caplog.at_level(logging.WARNING):
        tell(Background(make, retry_seconds=99.0), tmp_path)
    assert "No module named 'mlflow'" in caplog.text


def test_nested_configuration_becomes_dotted_names() -> None:
    assert flatten({"a": 1, "kl": {"target": 6.0, "x": {"y": None}}}) == {
        "a": "1",
        "kl.target": "6.0",
        "kl.x.y": "None",
    }


@pytest.mark.parametrize("project", ["../../etc", "a/b", "...", "desk run"])
def test_a_project_is_one_folder_below_the_attempt(project: str) -> None:
    name = safe_folder(project)
    assert "/" not in name
    assert name not in {"", ".", ".."}


def test_none_starts_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    before = threading.active_count()
    assert open_tracker(tiny_world.config(tmp_path), tmp_path) is None
    assert threading.active_count() == before


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from rlhf_trainer.tracking.tensorboard import TensorBoardTracker

    tell(Background(TensorBoardTracker), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "desk")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("kl")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert "| kl.target | 6.0 |" in _text(events, "params")
    assert "sha256:aaa" in _text(events, "dataset/preferences")
    assert "sha256:bbb" in _text(events, "artifact")
    assert "succeeded: Succeeded" in _text(events, "end")


def _text(events: Any, tag: str) -> str:
    (event,) = events.Tensors(tag)
    return str(event.tensor_proto.string_val[0].decode())


def test_wandb_offline_files_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    from rlhf_trainer.tracking.wandb import WandbTracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    tell(Background(WandbTracker, finish_seconds=120.0), tmp_path / "a2")
    (path,) = (tmp_path / "a2").rglob("run-*.wandb")
    history, config, summary = [], {}, {}
    for data in leveldb_records(path.read_bytes()[7:]):  # after ":W&B", its magic number and version
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json)
                            for item in record.history.item})  # fmt: skip
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        for update in record.summary.update:
            summary[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("run"):
            run = record.run
    assert (run.project, run.run_group, run.display_name) == ("desk", "uid-7", "default/tiny/a2")
    assert [(row["step"], row["kl"]) for row in history] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert config["kl.target"] == "6.0"
    assert config["dataset.preferences"]["digest"] == "sha256:" + "a" * 64
    assert summary["artifact.digest"] == "sha256:" + "b" * 64
    assert summary["reason"] == "Succeeded"


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, in which wandb keeps a run: blocks of 32 KiB, each record whole or in parts."""
    position, parts = 0, b""
    while position + 7 <= len(log):
        # wandb counts its own seven bytes into the first block.
        left = 32768 - (position + 7) % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        if kind == 0:
            return
        parts += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


class MLflowServer:
    """A real MLflow server on sqlite, in a virtual environment of its own: it pins what the trainer must not have."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = (folder / "server.log").open("wb")
        command = [str(_server_python()), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--default-artifact-root", str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, env={**clean, **quiet}, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._await_health(folder)

    def _await_health(self, folder: Path) -> None:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "server.log").read_text()[-3000:]) from None
                time.sleep(0.2)
            else:
                return

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the server and its workers
            self.process.wait()
        self._log.close()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"}
        )
        answer: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=30).read())
        return answer

    def runs(self, project: str) -> list[dict[str, Any]]:
        experiment = self.ask(f"experiments/get-by-name?experiment_name={project}")["experiment"]["experiment_id"]
        return list(self.ask("runs/search", {"experiment_ids": [experiment]}).get("runs", []))


def _server_python() -> Path:
    """The environment of the pinned server, made on first use and whenever the pins change."""
    python, stamp = SERVER_VENV / "bin" / "python", SERVER_VENV / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(SERVER_VENV)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)]
        subprocess.run(install, check=True, timeout=900)
        stamp.write_text(REQUIREMENTS.read_text())
    return python


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MLflowServer]:
    server = MLflowServer(folder)
    try:
        yield server
    finally:
        server.kill()


def tracked(world: TinyWorld, output: Path, name: str) -> AttemptConfig:
    tracking = Tracking(tracker=Choice.MLFLOW, project=name)
    training = training_of(tracking=tracking, deepspeed={"zero_stage": 0}, ensemble={"members": 1})
    return world.config(output, 2, training=training, name=name, grace_seconds=120)


def run_tracked(folder: Path, configs: dict[str, AttemptConfig], monkeypatch: pytest.MonkeyPatch, uri: str) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    paths = {name: folder / f"{name}.json" for name in configs}
    for name, config in configs.items():
        paths[name].write_text(config.to_json())
    done = run_ranks(SCRIPT, 2, folder, *map(str, paths.values()))
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads(path.with_suffix(".result").read_bytes()) for name, path in paths.items()}, done.stderr


def test_an_attempt_is_tracked_by_a_real_mlflow_server(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one run: parameters, inputs, every step, the artifact and the end, as the server's REST API says."""
    with mlflow_server(tmp_path) as server:
        configs = {"desk": tracked(tiny_world, tmp_path / "out", "desk")}
        results, _ = run_tracked(tmp_path, configs, monkeypatch, server.uri)
        result = results["desk"]
        (run,) = server.runs("desk")
        history = server.ask(f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss")["metrics"]
    assert result["failureClass"] == FailureClass.SUCCESS, result["message"]
    assert run["info"]["status"] == "FINISHED"
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert tags["rlhf.uid"] == "0000-tiny"
    assert tags["rlhf.artifact.digest"] == Artifact.model_validate(result["artifact"]).digest
    assert (params["learningRate"], params["deepspeed.zeroStage"], params["worldSize"]) == ("0.01", "0", "2")
    assert {each["dataset"]["name"] for each in run["inputs"]["dataset_inputs"]} == {"base_model", "preferences"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "a1" / "metrics.jsonl").read_text().splitlines()]
    seen = {int(each["step"]): each["value"] for each in history}
    assert seen == pytest.approx({row["step"]: row["loss"] for row in rows})


def test_a_dead_port_costs_training_nothing(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tracked(tiny_world, tmp_path / "out", "dead").model_copy(update={"grace_seconds": 4})
    results, log = run_tracked(tmp_path, {"dead": config}, monkeypatch, f"http://127.0.0.1:{free_port()}")
    assert results["dead"]["failureClass"] == FailureClass.SUCCESS
    assert log.count("tracking start failed") <= 1
    assert (tmp_path / "out" / "a1" / "metrics.jsonl").exists()


def test_a_server_killed_mid_run_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rlhf_trainer.tracking.mlflow import MLflowTracker

    with mlflow_server(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracker = Background(MLflowTracker, finish_seconds=3.0)
        tracker.start(info(tmp_path, "killed"))
        tracker.metrics(1, {"loss": 1.0})
        deadline = time.monotonic() + 120
        while not (time.monotonic() > deadline) and not _has_metric(server):
            time.sleep(0.1)
        assert _has_metric(server)
        server.kill()
        with caplog.at_level(logging.WARNING, "rlhf_trainer"):
            began = time.monotonic()
            for step in range(2, 200):
                tracker.metrics(step, {"loss": 1.0 / step})
            assert time.monotonic() - began < 1.0
            tracker.finish(False, "Diverged", "loss is nan")
            assert time.monotonic() - began < 10.0
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_trainer")]
    assert len([line for line in lines if line.startswith("tracking metrics failed")]) == 1


def _has_metric(server: MLflowServer) -> bool:
    try:
        return any(run["data"].get("metrics") for run in server.runs("killed"))
    except urllib.error.HTTPError:  # the experiment is not there yet
        return False
