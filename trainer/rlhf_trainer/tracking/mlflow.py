"""MLflow by its client alone: the server is where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from rlhf_trainer.tracking.base import Dataset, RunInfo

T = TypeVar("T")

_BATCH = 100  # params or tags of one request, the server's limit
_VALUE_LIMIT = 6000  # characters of a param
_DIGEST_LIMIT = 36  # characters of a dataset's digest


class MLflowTracker:
    """One MLflow run per attempt; the tag ``rlhf.uid`` joins the attempts of a run."""

    def __init__(self) -> None:
        # The client retries for minutes by default; what cannot be delivered soon is not worth the memory.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities = entities
        self._client = MlflowClient()
        self._run_id = ""

    def start(self, run: RunInfo) -> None:
        if self._run_id:
            return
        tags = {
            "mlflow.runName": run.title,
            "rlhf.uid": run.uid,
            "rlhf.attempt": str(run.attempt),
            "rlhf.kind": run.kind,
        }
        self._run_id = self._client.create_run(self._experiment(run.project), tags=tags).info.run_id

    def params(self, values: Mapping[str, str]) -> None:
        every = [self._entities.Param(name, value[:_VALUE_LIMIT]) for name, value in values.items()]
        for part in _chunks(every, _BATCH):
            self._client.log_batch(self._run_id, params=part)

    def dataset(self, dataset: Dataset) -> None:
        source = json.dumps({"uri": dataset.uri, "digest": dataset.digest})
        short = dataset.digest.removeprefix("sha256:")[:_DIGEST_LIMIT]
        entity = self._entities.Dataset(name=dataset.name, digest=short, source_type="uri", source=source)
        context = self._entities.InputTag("mlflow.data.context", dataset.name)
        given: Any = self._entities.DatasetInput(dataset=entity, tags=[context])
        self._client.log_inputs(self._run_id, datasets=[given])
        self._client.set_tag(self._run_id, f"rlhf.lineage.{dataset.name}", dataset.digest)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[self._entities.Metric(name, value, now, step) for name, value in values.items()]
        )

    def artifact(self, path: str, digest: str) -> None:
        self._client.set_tag(self._run_id, "rlhf.artifact.path", path)
        self._client.set_tag(self._run_id, "rlhf.artifact.digest", digest)

    def finish(self, succeeded: bool, reason: str, message: str) -> None:
        self._client.set_tag(self._run_id, "rlhf.reason", reason)
        self._client.set_tag(self._run_id, "rlhf.message", message)
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
