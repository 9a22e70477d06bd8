"""What the rollout tests need of a cluster: policies on a volume, a rollout, users who never stop asking."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from rlhf_gateway.wire import ARM_HEADER, CONFIG_KEY, FALLBACK_HEADER, REVISION_HEADER
from rlhf_trainer.digests import file_digest, folder_digest
from sandbox.cluster import Cluster
from sandbox.paths import CHECKOUT

Body = dict[str, Any]
CLAIM = "models"
PROMPTS = 200
_MAKE = """
import sys, torch
from pathlib import Path
from rlhf_trainer.desk.world import Sizes, generate
torch.set_num_threads(1)
generate(Path(sys.argv[1]), 0, Sizes(pairs=16, prompts=200, scores=16))
"""


@functools.cache
def desk() -> Path:
    """The service desk's policies and a filter trained on its labels, made once per version of the code."""
    sources = sorted(p for part in ("desk", "safety") for p in (CHECKOUT / "trainer/rlhf_trainer" / part).glob("*.py"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    made = CHECKOUT / ".build" / f"rollout-desk-{key}"
    if not (made / "models" / "filter.json").exists():
        aside = made.with_name(made.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run([sys.executable, "-c", _MAKE, str(aside)], check=True, cwd=CHECKOUT)
        train = [sys.executable, "-m", "rlhf_trainer.safety", "train", "--data", str(aside / "feedback/safety.jsonl")]
        subprocess.run([*train, "--out", str(aside / "models/filter.json")], check=True, cwd=CHECKOUT)
        shutil.rmtree(made, ignore_errors=True)
        aside.rename(made)
    return made


def eventually(what: str, check: Callable[[], Any], timeout: float = 90.0, every: float = 0.2) -> Any:
    """The first truthy answer. Raises AssertionError naming what did not come, and the last answer."""
    deadline, answer = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        answer = check()
        if answer:
            return answer
        time.sleep(every)
    raise AssertionError(f"not within {timeout:g} s: {what} (last: {answer!r})")


@dataclass
class Answer:
    """One conversation of one request, as the user saw it."""

    at: float  # time.time() when it was whole
    conversation: str
    status: int
    arm: str
    revision: str
    fallback: str
    error: str = ""


@dataclass
class Users:
    """Continuous traffic: `rate` conversations a second, open loop, each with one request and a name of its own."""

    url: str
    prompts: list[str]
    rate: float = 8.0
    answers: list[Answer] = field(default_factory=list)

    @contextmanager
    def asking(self) -> Iterator[Users]:
        stop = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(stop)), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join(timeout=60)

    async def _run(self, stop: threading.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks: set[asyncio.Task[None]] = set()
            number = len(self.answers)
            while not stop.is_set():
                task = asyncio.create_task(self._ask(session, f"c{id(self)}-{number}", number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
                await asyncio.sleep(1.0 / self.rate)
            await asyncio.gather(*tasks)

    async def _ask(self, session: aiohttp.ClientSession, conversation: str, number: int) -> None:
        body = {"model": "desk", "prompt": self.prompts[number % len(self.prompts)], "max_tokens": 16}
        headers = {"X-Conversation-Id": conversation}
        try:
            async with session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
                text = await response.text()
                got = response.headers
                arm, revision = got.get(ARM_HEADER, ""), got.get(REVISION_HEADER, "")
                error = "" if response.status == 200 else text[:300]
                answer = Answer(
                    time.time(), conversation, response.status, arm, revision, got.get(FALLBACK_HEADER, ""), error
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            answer = Answer(time.time(), conversation, 0, "", "", "", f"{type(problem).__name__}: {problem}")
        self.answers.append(answer)

    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def by(self, arm: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.arm == arm]


@dataclass
class Rollout:
    """One PolicyRollout called desk in a namespace of its own."""

    cluster: Cluster
    namespace: str
    folder: Path  # of the volume on the host

    def kubectl(self, *args: str, input: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *args, input=input)

    def get(self, resource: str, name: str) -> Body:
        text = self.kubectl("get", resource, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else {}

    def items(self, resource: str, selector: str = "") -> list[Body]:
        return list(json.loads(self.kubectl("get", resource, "-o", "json", "-l", selector))["items"])

    # Policies

    def policy(self, name: str, of: str = "desk-sft", note: str = "") -> Body:
        """A policy on the volume; a note makes it another digest that behaves the same."""
        target = self.folder / name
        if not target.exists():
            shutil.copytree(desk() / "models" / of, target)
            (target / "NOTE").write_text(note or name)
            for path in (target, *target.iterdir()):  # pods are not root
                path.chmod(0o755 if path.is_dir() else 0o644)
        return {"uri": f"pvc://{CLAIM}/{name}", "digest": folder_digest(target)}

    def filter(self) -> Body:
        target = self.folder / "filter.json"
        shutil.copyfile(desk() / "models" / "filter.json", target)
        target.chmod(0o644)
        return {"uri": f"pvc://{CLAIM}/filter.json", "digest": file_digest(target)}

    # The rollout

    def create(self, policy: Body, **spec: Any) -> None:
        """And wait until the first policy is served."""
        small = {"requests": {"cpu": "50m", "memory": "256Mi"}}
        body = {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": "PolicyRollout",
            "metadata": {"name": "desk", "namespace": self.namespace},
            "spec": {"policy": policy, "serving": {"resources": small}, "safetyFilter": self.filter(), **spec},
        }
        self.kubectl("create", "-f", "-", input=json.dumps(body))
        eventually("the first policy is served", lambda: self.phase() == "Healthy" and self.ready(), timeout=180)
        eventually("the node routes to every Service", self.routed)  # which no status can know

    def routed(self) -> bool:
        addresses = [service["spec"]["clusterIP"] for service in self.items("services")]
        for address in addresses:
            try:
                socket.create_connection((address, 8000), timeout=1).close()
            except OSError:
                return False
        return bool(addresses)

    def patch(self, **spec: Any) -> None:
        self.kubectl("patch", "policyrollout", "desk", "--type=merge", "-p", json.dumps({"spec": spec}))

    def decide(self, name: str, action: str, **more: Any) -> None:
        """A Decision about the rollout, by whoever runs this test."""
        user = json.loads(self.kubectl("auth", "whoami", "-o", "json"))["status"]["userInfo"]["username"]
        subject = {"kind": "PolicyRollout", "name": "desk"}
        spec = {"subject": subject, "action": action, "by": user, "reason": "looked into it", **more}
        body = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "Decision", "metadata": {"name": name}, "spec": spec}
        self.kubectl("create", "-f", "-", input=json.dumps(body))

    def status(self) -> Body:
        return dict(self.get("policyrollout", "desk").get("status", {}))

    def phase(self) -> str:
        return str(self.status().get("phase", ""))

    def condition(self, type: str) -> Body:
        return next((c for c in self.status().get("conditions", []) if c["type"] == type), {})

    def ready(self) -> bool:
        return self.condition("Ready").get("status") == "True"

    def entry(self, digest: str) -> Body:
        found = [entry for entry in self.status().get("revisions", []) if entry["digest"] == digest]
        return found[-1] if found else {}

    def weight(self) -> float:
        """In the gateway's configuration."""
        config = self.get("configmap", "desk-gateway").get("data", {}).get(CONFIG_KEY)
        return float(json.loads(config)["canaryWeightPercent"]) if config else 0.0

    def url(self) -> str:
        """Service addresses are reached from this machine."""
        return f"http://{self.get('service', 'desk-gateway')['spec']['clusterIP']}:8000"

    def users(self, rate: float = 8.0) -> Users:
        rows = (desk() / "feedback" / "prompts.jsonl").read_text().splitlines()[:PROMPTS]
        return Users(self.url(), [json.loads(row)["prompt"] for row in rows], rate)

    def until(self, phase: str, timeout: float = 180.0) -> Body:
        """The status in which the rollout first shows this phase."""

        def reached() -> Body | None:
            status = self.status()
            return status if status.get("phase") == phase else None

        try:
            return dict(eventually(f"phase {phase}", reached, timeout))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain()}") from error

    @contextmanager
    def watching(self, resource: str, *select: str) -> Iterator[list[tuple[float, Body]]]:
        """Objects of one resource as they are and as they change, each with the time at which it was seen."""
        command = self.cluster.kubectl_command("-n", self.namespace, "get", resource, *select, "--watch", "-o", "json")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        seen: list[tuple[float, Body]] = []

        def read() -> None:
            lines: list[str] = []
            for line in process.stdout or ():
                lines.append(line)
                if line.startswith("}"):  # the end of one indented document
                    seen.append((time.time(), json.loads("".join(lines))))
                    lines.clear()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            eventually("the watch has begun", lambda: seen, timeout=30)
            yield seen
        finally:
            process.kill()
            process.wait()
            thread.join(timeout=5)

    def explain(self) -> str:
        """What a person would look at when something did not come."""
        status = self.status()
        conditions = [f"{c['type']}={c['status']} {c['reason']}: {c['message']}" for c in status.get("conditions", [])]
        pods = self.kubectl("get", "pods", "-o", "wide")
        return "\n".join([str(status.get("phase")), *conditions, pods])
