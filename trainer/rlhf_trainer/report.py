"""``python -m rlhf_trainer.report --result PATH``: says again how an attempt ended, as this pod's termination message.

The operator starts it where the pods vanished together with their messages. Exit 0: the message is there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from rlhf_trainer.attempt import write_termination_message
from rlhf_trainer.wire import Result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_trainer.report", description=__doc__)
    parser.add_argument("--result", type=Path, required=True, help="the attempt's result.json")
    path: Path = parser.parse_args(arguments).result
    try:
        result = Result.model_validate_json(path.read_bytes())
    except OSError as error:
        print(f"{path}: {error.strerror}: the attempt ended before it could write its result", file=sys.stderr)
        return 1
    except ValidationError as error:
        print(f"{path}: not a result: {error}", file=sys.stderr)
        return 1
    print(result.compact())
    write_termination_message(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
