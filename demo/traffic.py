"""Live traffic on the gateway, from a pod beside it, for as long as an act lasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from demo import toolbox
from demo.cluster import Cluster, CommandError
from demo.setup import Images

RATE = 25  # requests per second: two cores serve the models, the gateway and the rest of the cluster
LIMIT_SECONDS = 900  # the generator stops by itself after this


@dataclass
class Traffic:
    cluster: Cluster
    images: Images
    name: str
    rollout: str
    _stopped: bool = field(default=False, init=False)

    @property
    def answers(self) -> str:
        return f"{toolbox.MOUNT}/traffic/{self.name}.jsonl"

    def __enter__(self) -> Traffic:
        live = self.cluster.get("policyrollout", self.rollout) or {}
        endpoint = live.get("status", {}).get("endpoint")
        if not endpoint:
            raise CommandError(f"policyrollout/{self.rollout} has no status.endpoint: nothing serves yet")
        command = ["python", "-m", "rlhf_gateway.traffic", "--url", endpoint, "--rate", str(RATE)]
        command += ["--prompts", f"{toolbox.MOUNT}/feedback/prompts.jsonl", "--out", self.answers]
        command += ["--conversations", "1000000", "--duration", str(LIMIT_SECONDS)]
        self.cluster.kubectl("delete", "job", self.name, "--ignore-not-found", "--wait")
        self.cluster.apply(toolbox.job(self.name, self.images.operator, command, cpu="100m"))
        self.cluster.kubectl("wait", "pod", "-l", f"job-name={self.name}", "--for=condition=Ready", "--timeout=60s")
        return self

    def stop(self) -> Mapping[str, Any]:
        """Ends the traffic and returns what the oracle counts in the answers users saw."""
        self.cluster.kubectl("delete", "job", self.name, "--wait")
        self._stopped = True
        command = ["python", "-m", "rlhf_trainer.desk", "judge-answers", "--answers", self.answers]
        text = toolbox.run(self.cluster, f"{self.name}-judge", self.images.trainer, command)
        return toolbox.last_object(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stopped:
            self.cluster.kubectl("delete", "job", self.name, "--ignore-not-found", "--wait=false", check=False)
