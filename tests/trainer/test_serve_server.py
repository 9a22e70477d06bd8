"""The policy server over HTTP: whole answers, streams, refusals, overload, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlhf_trainer.digests import folder_digest
from rlhf_trainer.serve import verify
from rlhf_trainer.serve.metrics import CATALOGUE
from tests.trainer.serve_world import NAME, eventually, serving, write_policy

ASK: dict[str, Any] = {"model": NAME, "prompt": "hello my parcel is late", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(folder) as (_, session, _worker):
        yield session


async def post(client: aiohttp.ClientSession, body: Any, path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
    async with client.post(path, json=body) as response:
        return response.status, await response.json()


async def chunks(client: aiohttp.ClientSession, body: Any, path: str = "/v1/completions") -> list[dict[str, Any]]:
    async with client.post(path, json=body | {"stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        lines = [line[6:] for line in (await response.read()).decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_completion_has_the_shape_clients_know(client: aiohttp.ClientSession) -> None:
    status, answer = await post(client, ASK)
    assert status == 200
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    assert len(choice["text"].split()) > 2
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 6  # five words and the begin-of-sequence token
    assert usage["total_tokens"] == 6 + usage["completion_tokens"]


async def test_a_stream_adds_up_to_the_whole_answer_token_by_token(client: aiohttp.ClientSession) -> None:
    _, whole = await post(client, ASK)
    streamed = await chunks(client, ASK | {"stream_options": {"include_usage": True}})
    assert streamed[-1]["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in streamed[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    written = sum(1 for choice in choices if choice["text"])
    assert written >= whole["usage"]["completion_tokens"] - 1  # one chunk per token, but for the end token


async def test_seed_and_temperature_decide_the_answer(client: aiohttp.ClientSession) -> None:
    async def text(**changes: Any) -> str:
        _, answer = await post(client, ASK | changes)
        return str(answer["choices"][0]["text"])

    assert await text() == await text()
    assert len({await text(seed=seed) for seed in range(6)}) > 1
    assert len({await text(seed=seed, temperature=0) for seed in range(3)}) == 1
    unseeded = ASK | {"seed": None}
    assert len({(await post(client, unseeded))[1]["choices"][0]["text"] for _ in range(6)}) > 1


async def test_a_chat_is_rendered_by_the_template_with_one_beginning(client: aiohttp.ClientSession) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": ASK["prompt"]}], "max_tokens": 12, "seed": 1}
    status, answer = await post(client, body, "/v1/chat/completions")
    _, plain = await post(client, ASK)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    assert answer["usage"] == plain["usage"]
    streamed = await chunks(client, body, "/v1/chat/completions")
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
    assert content == plain["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_is_not_shown(client: aiohttp.ClientSession, stream: bool) -> None:
    _, whole = await post(client, ASK)
    text = whole["choices"][0]["text"]
    stop = text.split()[2]
    body = ASK | {"stop": [f" {stop}"]}
    if stream:
        streamed = [chunk["choices"][0] for chunk in await chunks(client, body)]
        found, reason = "".join(choice["text"] for choice in streamed), streamed[-1]["finish_reason"]
    else:
        _, answer = await post(client, body)
        found, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
    assert found == text[: text.index(f" {stop}")]
    assert reason == "stop"


async def test_the_context_bounds_an_answer(client: aiohttp.ClientSession) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "seed": 5}
    status, answer = await post(client, body, "/v1/chat/completions")
    assert status == 200
    assert answer["usage"]["total_tokens"] <= 64


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"model": "other"}, 404, "this server serves 'desk'"),
        ({"max_tokens": 100}, 400, "ask for at most 58"),
        ({"prompt": "hello " * 70}, 400, "shorten it"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [5, 100_000]}, 400, "token ids must lie between"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"top_p": 0.9}, 400, "top_p is not supported by this server: leave it out"),
        ({"logprobs": 5}, 400, "logprobs is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
    ],
)
async def test_a_request_that_cannot_be_served_says_what_to_do(
    client: aiohttp.ClientSession, changes: dict[str, Any], status: int, told: str
) -> None:
    found, answer = await post(client, ASK | changes)
    assert (found, told in answer["error"]["message"]) == (status, True), answer
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"\xff", b"[" * 100_000]
    + [json.dumps(ASK | spoilt).encode() for spoilt in ({"prompt": "half a smile: \ud83d"}, {"stop": "\ud83d"})],
)
async def test_a_body_that_is_no_object_is_refused(client: aiohttp.ClientSession, body: bytes) -> None:
    async with client.post("/v1/completions", data=body) as response:
        assert response.status == 400
        assert "JSON" in (await response.json())["error"]["message"]


async def test_neutral_values_of_unsupported_parameters_pass(client: aiohttp.ClientSession) -> None:
    status, _ = await post(client, ASK | {"top_p": 1, "presence_penalty": 0, "logit_bias": {}, "future_field": 1})
    assert status == 200


async def test_models_and_health(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/models") as response:
        (model,) = (await response.json())["data"]
        assert (model["id"], model["max_model_len"]) == (NAME, 64)
    async with client.get("/health") as response:
        assert response.status == 200


async def test_many_at_once_get_what_they_would_get_alone(folder: Path) -> None:
    async with serving(folder, max_batch=4) as (_, client, _worker):
        bodies = [ASK | {"prompt": f"hello my parcel is late {'be ' * (i % 5)}warm", "seed": i} for i in range(20)]
        alone = [(await post(client, body))[1]["choices"] for body in bodies]
        together = await asyncio.gather(*(post(client, body) for body in bodies))
        assert [answer["choices"] for _, answer in together] == alone


async def test_a_full_queue_refuses_at_once_and_says_when(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder, max_batch=1, max_waiting=2) as (_, client, worker):
        gate, join = threading.Event(), worker._batch.join
        monkeypatch.setattr(worker._batch, "join", lambda rows: gate.wait(10) and join(rows))
        asking = [asyncio.create_task(post(client, ASK))]
        await eventually(lambda: worker._writers)
        asking += [asyncio.create_task(post(client, ASK)) for _ in range(2)]
        await eventually(lambda: len(worker._waiting) == 2)
        async with client.post("/v1/completions", json=ASK) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert "overloaded: 2 requests wait" in await response.text()
        gate.set()
        assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200, 200]


async def test_a_failing_forward_pass_breaks_its_answers_and_not_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folder) as (_, client, worker):
        monkeypatch.setattr(worker._batch, "step", Mock(side_effect=RuntimeError("out of memory")))
        status, answer = await post(client, ASK)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "out of memory" in answer["error"]["message"]
        assert (await post(client, ASK))[0] == 200


async def test_a_server_that_stops_breaks_off_what_it_cannot_finish(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folder, max_batch=1) as (_, client, worker):
        gate, join = threading.Event(), worker._batch.join
        monkeypatch.setattr(worker._batch, "join", lambda rows: gate.wait(10) and join(rows))
        asking = [asyncio.create_task(post(client, ASK)) for _ in range(2)]
        await eventually(lambda: worker._writers and worker._waiting)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
        await eventually(lambda: worker._stopping)
        gate.set()
        for status, answer in await asyncio.gather(*asking):
            assert (status, answer["error"]["code"]) == (503, "broken_off")
        await stopping


async def test_a_client_that_leaves_frees_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder, max_batch=1) as (_, client, worker):
        step, left = worker._batch.step, threading.Event()
        monkeypatch.setattr(worker._batch, "step", lambda: left.wait(10) and step())
        body = ASK | {"stream": True, "max_tokens": 50, "prompt": [5, 6, 7]}
        async with client.post("/v1/completions", json=body) as response:
            await response.content.readline()
            (writer,) = worker._writers
            response.close()
        await eventually(writer.job.cancelled.is_set)
        left.set()
        await eventually(lambda: not worker._writers and len(worker._batch) == 0)
        assert writer.job.written < 50
        assert (await post(client, ASK))[0] == 200


async def test_clients_that_left_do_not_fill_the_queue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder, max_batch=1, max_waiting=2) as (_, client, worker):
        gate, join = threading.Event(), worker._batch.join
        monkeypatch.setattr(worker._batch, "join", lambda rows: gate.wait(10) and join(rows))
        running = asyncio.create_task(post(client, ASK))
        await eventually(lambda: worker._writers)
        leaving = [asyncio.create_task(post(client, ASK)) for _ in range(2)]
        await eventually(lambda: len(worker._waiting) == 2)
        for one in leaving:
            one.cancel()
        await eventually(lambda: all(job.cancelled.is_set() for job in worker._waiting))
        asking = [asyncio.create_task(post(client, ASK)) for _ in range(2)]
        await eventually(lambda: asking[1].done() or not any(job.cancelled.is_set() for job in worker._waiting))
        gate.set()
        assert [status for status, _ in await asyncio.gather(running, *asking)] == [200, 200, 200]


async def test_metrics_carry_vllms_names(client: aiohttp.ClientSession) -> None:
    _, answer = await post(client, ASK)
    async with client.get("/metrics") as response:
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    for one in CATALOGUE:
        family = families[one.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (one.kind, one.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(one.labels)
    written = next(s for s in families["vllm:generation_tokens"].samples if s.name.endswith("_total"))
    assert written.value == answer["usage"]["completion_tokens"]
    assert written.labels == {"model_name": NAME}


async def start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rlhf_trainer.serve", "--model", str(folder), "--served-name", NAME,
        "--host", "127.0.0.1", "--port", "0", *arguments,
        stderr=asyncio.subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


async def test_the_process_verifies_serves_and_drains(folder: Path) -> None:
    process = await start(folder, "--digest", folder_digest(folder), "--drain-accept-seconds", "0.1")
    assert process.stderr is not None
    port, ready = 0, False
    async with asyncio.timeout(180):  # importing torch on a busy machine
        while not ready:
            line = (await process.stderr.readline()).decode()
            assert line, "the server ended before it was ready"
            port = int(line.rsplit("port", 1)[1]) if "listening on port" in line else port
            ready = "ready: serving" in line
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
        client.post("/v1/completions", json=ASK | {"stream": True, "max_tokens": 50}) as response,
    ):
        process.send_signal(signal.SIGTERM)
        assert (await response.read()).endswith(b"[DONE]\n\n")
    assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_the_process_refuses_a_folder_that_is_not_the_pinned_one(folder: Path) -> None:
    process = await start(folder, "--digest", "sha256:" + "0" * 64)
    _, stderr = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 11
    assert b"is pinned" in stderr


def test_servers_that_do_not_ask_have_their_policy_verified_before_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = folder_digest(folder)
    assert verify.main(["--model", str(folder), "--digest", digest]) == 0
    for other, words in ((folder, "is pinned"), (tmp_path, "holds no file"), (tmp_path / "none", "is not a folder")):
        assert verify.main(["--model", str(other), "--digest", "sha256:" + "0" * 64]) == 11
        assert words in capsys.readouterr().err
