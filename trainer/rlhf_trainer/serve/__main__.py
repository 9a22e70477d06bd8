"""`python -m rlhf_trainer.serve`: serve one policy until SIGTERM, then drain."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from rlhf_trainer.allocator import keep_freed_memory
from rlhf_trainer.digests import DigestMismatchError
from rlhf_trainer.serve.batch import UnsupportedModelError
from rlhf_trainer.serve.loader import LoadError, load
from rlhf_trainer.serve.metrics import Metrics
from rlhf_trainer.serve.server import Server
from rlhf_trainer.serve.worker import Worker
from rlhf_trainer.wire import ExitCode

log = logging.getLogger("rlhf_trainer.serve")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_trainer.serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face causal language model")
    parser.add_argument("--served-name", required=True, help="the name clients ask for")
    parser.add_argument("--digest", help="sha256:… folder digest that must match before the server is ready")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16, help="answers written at the same time")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that may wait; more are refused (503)")
    parser.add_argument("--drain-accept-seconds", type=float, default=5.0, help="accept on, after SIGTERM")
    parser.add_argument("--drain-answer-seconds", type=float, default=50.0, help="finish answers, after that")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, 11 the folder is not what was pinned or cannot be served (a restart will not help)."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = arguments().parse_args(argv)
    keep_freed_memory()
    try:
        asyncio.run(serve(options))
    except (LoadError, DigestMismatchError, UnsupportedModelError, OSError) as error:
        log.error("%s", error)
        return int(ExitCode.INVALID)
    return int(ExitCode.SUCCESS)


async def serve(options: argparse.Namespace) -> None:
    """Answers /health (503) while the model loads; raises when it cannot be loaded."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics(options.served_name)
    server = Server(options.served_name, metrics)
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    worker: Worker | None = None
    try:
        site = web.TCPSite(runner, options.host, options.port)
        await site.start()
        log.info("loading %s; listening on port %d", options.model, runner.addresses[0][1])
        policy = await asyncio.to_thread(load, options.model, options.digest)
        worker = Worker(policy, metrics, options.max_batch, options.max_waiting)
        worker.start()
        server.open_up(policy, worker)
        log.info("ready: serving %s", options.served_name)
        await stop.wait()
        server.draining = True
        await asyncio.sleep(options.drain_accept_seconds)
        await site.stop()
        await _finish(server, options.drain_answer_seconds)
    finally:
        await runner.cleanup()
        if worker is not None:
            await asyncio.to_thread(worker.stop)


async def _finish(server: Server, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await server.quiet()
    except TimeoutError:
        log.warning("answers still in flight after %g s are cut", seconds)


if __name__ == "__main__":
    sys.exit(main())
