"""The container of the engine `vllm`, run for real: it serves the policy that the builtin server serves, and drains."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlhf_gateway.traffic import Plan, Traffic
from rlhf_gateway.wire import SERVE_PORT, Backend
from rlhf_trainer.desk.model import build_model, build_tokenizer
from tests.trainer.serve_world import serving
from tests.trainer.training_world import free_port
from tests.trainer.vllm_world import VENV, WIDTH, vllm_python
from tests.unit.gateway_world import world
from tests.unit.rollout_world import A_NAME, World

NAME = "desk"
PROMPTS = ("hello my parcel is late be warm", "hi my login is broken be blunt", "where is my order")


@dataclass
class Served:
    url: str
    process: asyncio.subprocess.Process

    async def ask(self, client: aiohttp.ClientSession, **fields: Any) -> dict[str, Any]:
        async with client.post(f"{self.url}/v1/completions", json={"model": NAME, "max_tokens": 12, **fields}) as said:
            assert said.status == 200, await said.text()
            answer: dict[str, Any] = await said.json()
            return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("policy"), build_tokenizer()
    build_model(tokenizer, width=WIDTH, layers=1, seed=2, initializer_range=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def container() -> dict[str, Any]:
    """As the operator writes it."""
    asked = {"engine": "vllm", "image": "vllm:1", "args": ["--dtype", "float32"]}
    deployment = World(serving=asked).serving().children["Deployment", A_NAME]
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    made: dict[str, Any] = found
    return made


@asynccontextmanager
async def vllm(folder: Path, home: Path) -> AsyncIterator[Served]:
    """The container's command on loopback, in its environment, with the places of this machine."""
    made, port = container(), free_port()
    environment = {each["name"]: each["value"] for each in made["env"]}
    here = {environment["RLHF_MODEL_PATH"]: str(folder), "0.0.0.0": "127.0.0.1", str(SERVE_PORT): str(port)}
    words = [here.get(word, word) for word in (*made["command"], *made["args"])]
    words[0] = str(vllm_python().with_name(words[0]))
    own = {"HOME": str(home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own["XDG_CACHE_HOME"] = str(VENV / "cache")  # what it finds out about a model's class takes it long
    with (home / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *words, env=environment | own, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        try:
            await _healthy(f"http://127.0.0.1:{port}/health", process, home / "log")
            yield Served(f"http://127.0.0.1:{port}", process)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _end(log: Path) -> str:
    return log.read_text()[-4000:]


async def _healthy(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(400), aiohttp.ClientSession() as client:
        while True:
            assert process.returncode is None, _end(log)
            try:
                async with client.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.2)


async def test_it_serves_what_the_builtin_server_serves_behind_the_gateway_and_drains(
    folder: Path, tmp_path: Path
) -> None:
    async with vllm(folder, tmp_path) as other, serving(folder) as (url, client, _), world() as w:
        builtin = Served(url, other.process)
        for prompt in PROMPTS:
            asked = {"prompt": prompt, "temperature": 0}
            ours, theirs = await builtin.ask(client, **asked), await other.ask(client, **asked)
            assert theirs["choices"][0]["text"].split() == ours["choices"][0]["text"].split() != []
            assert theirs["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]

        arms = {
            "stable": Backend(revision="r1", digest="sha256:" + "1" * 64, url=url),
            "canary": Backend(revision="r2", digest="sha256:" + "2" * 64, url=other.url),
        }
        await w.configure(**arms, canary_weight_percent=50.0)
        traffic = Traffic(Plan(w.url, PROMPTS, 8.0, 10_000, 3.0, max_tokens=20, stream=True), io.StringIO())
        await traffic.run()
        assert [line for line in traffic.lines if not line.ok] == []
        assert {(line.arm, line.revision) for line in traffic.lines} == {("stable", "r1"), ("canary", "r2")}

        await w.configure(**arms, canary_weight_percent=100.0)
        body: dict[str, Any] = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 50, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.post(f"{w.url}/v1/completions", json=body) as response:
            first = await response.content.readline()
            other.process.send_signal(signal.SIGTERM)
            rest = (first + await response.read()).decode()
        assert '"completion_tokens":50' in rest.replace(" ", "")
        assert rest.endswith("[DONE]\n\n")
        assert await asyncio.wait_for(other.process.wait(), 60) == 0
