"""`python -m rlhf_gateway`: one gateway pod of a PolicyRollout."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from rlhf_gateway.app import Gateway
from rlhf_gateway.settings import Settings, SettingsError


def main() -> None:
    """Run until SIGTERM, then drain. Exit code 1, with a message: the environment is wrong."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        sys.exit(f"rlhf-gateway: {error}")
    asyncio.run(run(settings))


async def run(settings: Settings) -> None:
    """One gateway, from start to the end of its drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gateway = Gateway(settings)
    try:
        await gateway.start()
        await gateway.run_until(stop)
    finally:
        await gateway.close()


if __name__ == "__main__":
    main()
