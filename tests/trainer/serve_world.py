"""A tiny random policy on disk, and a running server in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import torch
from aiohttp import web

from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.serve.loader import load
from rlhf_trainer.serve.metrics import Metrics
from rlhf_trainer.serve.server import Server
from rlhf_trainer.serve.worker import Worker

NAME = "desk"


async def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition; fail with a timeout when it never holds."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def write_policy(folder: Path, *, seed: int = 0, layers: int = 1) -> Path:
    """A random Llama of a few thousand weights that ends an answer now and then."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, width=16, layers=layers, seed=seed)
    with torch.no_grad():  # spread the logits: greedy answers of an untrained model are all one word
        model.get_input_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@asynccontextmanager
async def serving(
    folder: Path, *, max_batch: int = 8, max_waiting: int = 64
) -> AsyncIterator[tuple[str, aiohttp.ClientSession, Worker]]:
    """A ready server: its URL, a client session, and its worker."""
    metrics = Metrics(NAME)
    server = Server(NAME, metrics)
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    policy = load(folder, None)
    worker = Worker(policy, metrics, max_batch, max_waiting)
    worker.start()
    server.open_up(policy, worker)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}", client, worker
    finally:
        await runner.cleanup()
        worker.stop()
