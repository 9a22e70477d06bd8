"""The operator as it is, over the toy kind: `python -m` this with `--config FILE --kubeconfig FILE`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rlhf_operator.app import App
from rlhf_operator.config import Config, load
from rlhf_operator.obs import logging as logs
from tests.property.toy import WIDGET


async def _run(config: Config, kubeconfig: Path) -> int:
    app = await App.create(config, (WIDGET,), kubeconfig)
    return await app.run()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    arguments = parser.parse_args()
    config = load(arguments.config)
    logs.configure(config.log.level, config.log.format)
    return asyncio.run(_run(config, arguments.kubeconfig))


if __name__ == "__main__":
    sys.exit(main())
