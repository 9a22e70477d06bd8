"""`rlhf-operator`: reads its configuration and runs until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_operator.app import App
from rlhf_operator.config import DEFAULT_PATH, Config, ConfigError, load
from rlhf_operator.kinds import KINDS
from rlhf_operator.obs import logging as logs


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rlhf-operator", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"YAML file (default: {DEFAULT_PATH})")
    parser.add_argument(
        "--namespace",
        action="append",
        metavar="NAME",
        help="serve only this namespace; may be repeated (default: what the configuration says, else the cluster)",
    )
    parser.add_argument("--kubeconfig", type=Path, help="act as this kubeconfig's user (default: the ServiceAccount)")
    return parser.parse_args(argv)


async def _run(config: Config, kubeconfig: Path | None) -> int:
    app = await App.create(config, KINDS, kubeconfig)
    return await app.run()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 after a signal, 1 after a failure, 2 for a bad configuration."""
    arguments = _arguments(argv)
    namespaces = tuple(arguments.namespace) if arguments.namespace else None
    try:
        config = load(arguments.config, namespaces=namespaces)
    except ConfigError as error:
        print(f"rlhf-operator: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log.level, config.log.format)
    return asyncio.run(_run(config, arguments.kubeconfig))


if __name__ == "__main__":
    sys.exit(main())
