"""`python -m rlhf_trainer.serve.verify`: is this the policy that was pinned? For servers that do not ask themselves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_trainer.digests import DigestMismatchError, check_digest, folder_digest
from rlhf_trainer.wire import ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 it is, 11 it is not or cannot be read (a restart will not help)."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_trainer.serve.verify", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--digest", required=True, help="sha256:… folder digest that it must have")
    options = parser.parse_args(argv)
    try:
        check_digest(folder_digest(options.model), options.digest, f"model folder {options.model}")
    except (DigestMismatchError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return int(ExitCode.INVALID)
    print(f"{options.model} is {options.digest}")
    return int(ExitCode.SUCCESS)


if __name__ == "__main__":
    sys.exit(main())
