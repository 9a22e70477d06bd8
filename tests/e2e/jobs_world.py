"""What the job tests need of a cluster: a namespace with a volume, jobs that play an ending, patience by watching."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from sandbox.cluster import Cluster
from sandbox.errors import SandboxError
from sandbox.paths import CHECKOUT

Body = dict[str, Any]
CLAIM = "desk"
PATIENCE = 180  # seconds; on an idle machine a pod that plays an ending takes two
ANY_DIGEST = "sha256:" + "0" * 64
FILTER = "models/safety-filter.json"
_MAKE = """
import json, sys, torch
from pathlib import Path
from rlhf_trainer.desk.world import Sizes, generate
from rlhf_trainer.digests import dataset_digest, file_digest
from rlhf_trainer.safety.__main__ import main
torch.set_num_threads(1)
out = Path(sys.argv[1])
small = Sizes(pairs=1200, prompts=64, scores=32, safety=600, pretrain_steps=40, tune_steps=20, leaky_steps=2)
digests = generate(out, 0, small)
assert main(["train", "--data", str(out / "feedback/safety.jsonl"), "--out", str(out / "FILTER")]) == 0
# What the raters preferred, as demonstrations.
pairs = [json.loads(line) for line in (out / "feedback/careful.jsonl").read_text().splitlines()]
chosen = [{"prompt": row["prompt"], "response": row["response_" + row["preference"]]}
          for row in pairs if row["preference"] in ("a", "b")]
path = out / "feedback/demonstrations.jsonl"
path.write_text("".join(json.dumps(row) + "\\n" for row in chosen))
digests |= {"feedback/demonstrations.jsonl": dataset_digest(path), "FILTER": file_digest(out / "FILTER")}
(out / "digests.json").write_text(json.dumps(digests))
""".replace("FILTER", FILTER)

# Plays a trainer without torch: what it is told to do, by attempt and index, as the launcher would end.
PLAYER = textwrap.dedent(
    """
    import http.server, json, os, signal, sys, threading, time
    config = json.load(open("/etc/rlhf/attempt.json"))
    attempt, index = config["attempt"], int(os.environ["PET_NODE_RANK"])
    now = lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def end(code, cls, **more):
        body = {"failureClass": cls, "reason": cls, "message": f"played {cls}", "exitCode": code, "attempt": attempt,
                "uid": config["uid"], "finishedAt": now(), **more}
        open("/dev/termination-log", "w").write(json.dumps(body))
        os._exit(code)

    def succeed():
        end(0, "Success", artifact={"path": f"{config['output']['path']}/a{attempt}/artifact",
                                    "digest": "sha256:" + "d" * 64})

    def wait():
        signal.signal(signal.SIGTERM, lambda *_: end(20, "Preempted"))
        while True:
            time.sleep(3600)

    def serve(world_size):
        body = {"attempt": attempt, "uid": config["uid"], "worldSize": world_size, "phase": "Training", "step": 1,
                "totalSteps": 9, "startedAt": now(), "updatedAt": now()}
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())
        server = http.server.HTTPServer(("", 8080), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    """
)


@functools.cache
def desk() -> Path:
    """A small service desk, made once per version of the code that makes it."""
    folders = [CHECKOUT / "trainer/rlhf_trainer" / part for part in ("desk", "generate", "models", "algos", "safety")]
    sources = sorted(path for folder in folders for path in folder.glob("*.py"))
    key = hashlib.sha256(b"".join([_MAKE.encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:12]
    made = CHECKOUT / ".build" / f"jobs-desk-{key}"
    if not made.exists():
        aside = made.with_name(made.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run([sys.executable, "-c", _MAKE, str(aside)], check=True, cwd=CHECKOUT)
        aside.rename(made)
    return made


class Namespace:
    """One namespace with the volume `desk`, and kubectl in it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.folder = cluster.volume(f"{name}/{CLAIM}")

    def delete(self) -> None:
        self.kubectl("delete", "rewardmodeljobs,policyoptimizationjobs", "--all", "--timeout=30s")
        self.cluster.kubectl("delete", "namespace", self.name, "--wait=false")
        shutil.rmtree(self.folder, ignore_errors=True)

    def kubectl(self, *args: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.name, *args, input=input)

    def bring_desk(self) -> dict[str, str]:
        """The service desk's files on the volume; their digests by path."""
        for part in ("models", "feedback"):
            shutil.copytree(desk() / part, self.folder / part)
        for path in self.folder.rglob("*"):
            path.chmod(0o777 if path.is_dir() else 0o644)  # pods run as another user than this test
        digests: dict[str, str] = json.loads((desk() / "digests.json").read_text())
        return digests

    # Jobs.

    def create(self, name: str, kind: str = "RewardModelJob", **spec: Any) -> None:
        inputs = {"uri": f"pvc://{CLAIM}/any", "digest": ANY_DIGEST}
        fields = ("baseModel", "preferences") if kind == "RewardModelJob" else ("policy", "prompts")
        body = {
            "apiVersion": "rlhf.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name},
            "spec": {**dict.fromkeys(fields, inputs), "output": {"uri": f"pvc://{CLAIM}/out/{name}"}, **spec},
        }
        self.kubectl("create", "-f", "-", input=json.dumps(body))

    def patch(self, name: str, kind: str = "rewardmodeljob", **spec: Any) -> None:
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def wait(self, what: str, condition: str, seconds: int = PATIENCE) -> None:
        """On a watch; what did not come is explained by the object's own words."""
        try:
            self.kubectl("wait", what, f"--for={condition}", f"--timeout={seconds}s")
        except SandboxError as error:
            raise AssertionError(f"{what}: not {condition} in {seconds} s\n{self.explain(what)}") from error

    def ended(self, name: str, type: str = "Failed", seconds: int = PATIENCE, kind: str = "rewardmodeljob") -> Body:
        """Waits for the end of a job, which must be this one; returns its status."""
        self.wait(f"{kind}/{name}", "jsonpath={.status.completionTime}", seconds)
        status = self.status(name, kind)
        assert condition(status, type)[0] == "True", self.explain(f"{kind}/{name}")
        return status

    def explain(self, what: str) -> str:
        """Its status whole, then the ends of what is longer the more its neighbours did."""
        status = self.kubectl("get", what, "-o", "jsonpath={.status}")
        around = self.kubectl("get", "pods,jobs", "-o", "wide")
        events = self.kubectl("get", "events", "--sort-by=.lastTimestamp")
        return "\n".join([status, around[-3000:], events[-3000:]])

    # What tests ask.

    def get(self, resource: str, name: str) -> Body:
        body: Body = json.loads(self.kubectl("get", resource, name, "-o", "json"))
        return body

    def status(self, name: str, kind: str = "rewardmodeljob") -> Body:
        status: Body = self.get(kind, name).get("status", {})
        return status

    def pods(self, job: str) -> list[Body]:
        found = json.loads(self.kubectl("get", "pods", "-l", f"rlhf.dev/name={job}", "-o", "json"))
        return list(found["items"])

    def events(self, job: str, reason: str) -> list[str]:
        fields = f"involvedObject.name={job},reason={reason}"
        found = json.loads(self.kubectl("get", "events", f"--field-selector={fields}", "-o", "json"))
        return [str(event["message"]) for event in found["items"]]

    def decide(self, name: str, kind: str, job: str, action: str, **more: Any) -> None:
        """A Decision about a job, by whoever runs this test."""
        user = json.loads(self.kubectl("auth", "whoami", "-o", "json"))["status"]["userInfo"]["username"]
        spec = {
            "subject": {"kind": kind, "name": job},
            "action": action,
            "by": user,
            "reason": "looked into it",
            **more,
        }
        body = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "Decision", "metadata": {"name": name}, "spec": spec}
        self.kubectl("create", "-f", "-", input=json.dumps(body))

    def evict(self, pod: str) -> None:
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": self.name}}
        path = f"/api/v1/namespaces/{self.name}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(body))


def condition(status: Body, type: str) -> tuple[str, str]:
    found = next((c for c in status.get("conditions", []) if c["type"] == type), {})
    return found.get("status", ""), found.get("reason", "")


def playing(script: str, nodes: int = 1, **more: Any) -> Body:
    """A trainer whose pods play an ending instead of training."""
    command = ["python", "-c", PLAYER + textwrap.dedent(script)]
    container = {"name": "trainer", "command": command, **more}
    # Without a request a pod gets next to nothing of a busy machine.
    resources = {"requests": {"cpu": "50m"}}
    return {"numNodes": nodes, "resourcesPerNode": resources, "podTemplate": {"spec": {"containers": [container]}}}
