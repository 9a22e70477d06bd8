"""A real Prometheus scrapes operator, gateway and trainer; its queries return what was really done."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from sandbox import binaries
from tests.e2e.conftest import OPERATOR_NAMESPACE
from tests.e2e.jobs_world import Namespace
from tests.e2e.rollout_world import Rollout, eventually

Body = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def addresses(pods: list[Body], port: int) -> list[str]:
    return [f"{pod['status']['podIP']}:{port}" for pod in pods if pod.get("status", {}).get("podIP")]


@contextmanager
def prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Callable[[str], float | None]]:
    """A server that scrapes `targets` (job -> addresses) every second; yields a function from query to value."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": found}]} for job, found in targets.items()],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    command = [str(binaries.prometheus()), f"--config.file={folder}/prometheus.yml", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen([*command, f"--storage.tsdb.path={folder}/data"], stdout=log, stderr=log)
    try:
        yield lambda query: ask(address, query)
    finally:
        server.kill()
        server.wait()


def ask(address: str, query: str) -> float | None:
    """The one value of an instant query; None while there is none."""
    try:
        with urlopen(f"http://{address}/api/v1/query?{urlencode({'query': query})}", timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
    except (URLError, OSError):
        return None  # the server is still starting
    return float(result[0]["value"][1]) if result else None


def test_prometheus_reads_operator_and_gateway(rollout: Rollout, tmp_path: Path) -> None:
    rollout.create(
        rollout.policy("base"),
        stages=[{"weightPercent": 10, "minSamples": 10}],
        guardrails=[{"metric": "availability", "margin": 0.05}],
    )
    operators = json.loads(rollout.cluster.kubectl("get", "pods", "-n", OPERATOR_NAMESPACE, "-o", "json"))["items"]
    gateways = rollout.items("pods", "rlhf.dev/component=gateway")
    targets = {"operator": addresses(operators, 8080), "gateway": addresses(gateways, 9090)}
    with prometheus(tmp_path, targets) as query:
        with rollout.users(rate=20).asking() as users:
            eventually("thirty answers", lambda: len(users.answers) >= 30)
        sent = len(users.answers)
        assert not users.failures()
        name = f'namespace="{rollout.namespace}",name="desk"'
        expected = {
            "sum(rlhf_gateway_requests_total)": float(sent),
            "sum(rlhf_gateway_failures_total)": 0.0,
            "sum(rlhf_gateway_answer_duration_seconds_count)": float(sent),
            "sum(rlhf_gateway_canary_weight_percent)": 0.0,
            "sum(rlhf_operator_leader_election_master_status)": 1.0,
            f'rlhf_resource_phase{{kind="PolicyRollout",{name},phase="Healthy"}}': 1.0,
            "sum(rlhf_operator_reconcile_panics_total) or vector(0)": 0.0,
            'count(up{job=~"operator|gateway"} == 1)': float(sum(map(len, targets.values()))),
        }
        for text, value in expected.items():
            eventually(f"{text} = {value}", lambda text=text, value=value: query(text) == value, timeout=30)


def test_prometheus_reads_a_training_pod(jobs: Namespace, tmp_path: Path) -> None:
    digests = jobs.bring_desk()
    inputs = {
        "baseModel": {"uri": "pvc://desk/models/desk-sft", "digest": digests["models/desk-sft"]},
        "preferences": {"uri": "pvc://desk/feedback/careful.jsonl", "digest": digests["feedback/careful.jsonl"]},
    }
    jobs.create("scraped", **inputs, training={"epochs": 100, "ensemble": {"members": 1}})  # long enough to be seen
    jobs.wait("rewardmodeljob/scraped", "jsonpath={.status.phase}=Running", seconds=120)
    with prometheus(tmp_path, {"trainer": addresses(jobs.pods("scraped"), 8080)}) as query:
        eventually("a step", lambda: (query("rlhf_trainer_step") or 0) >= 1, timeout=60)
        assert query("rlhf_trainer_world_size") == 1.0
        assert query('rlhf_trainer_phase{phase="Training"}') == 1.0
        loss = query("rlhf_trainer_loss")
        assert loss is not None
        assert 0.0 < loss < 5.0
