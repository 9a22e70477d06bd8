"""Results are one JSON object on one line, which a pod's log cannot tear apart by what stderr says meanwhile.

``python -m rlhf_trainer.desk generate --out DIR``, ``… annotate --pairs FILE --out FILE``,
``… judge --policy PATH --against PATH`` and ``… judge-answers --answers FILE``."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from rlhf_trainer.desk.answers import count_answers, summary
from rlhf_trainer.desk.datasets import annotate, write_rows
from rlhf_trainer.desk.judge import judge
from rlhf_trainer.desk.raters import careful_panel
from rlhf_trainer.desk.world import generate


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)  # digests are promised for one thread
    transformers_logging.disable_progress_bar()
    return int(_COMMANDS[arguments.command](arguments))


def _generate(arguments: argparse.Namespace) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    digests = generate(arguments.out, arguments.seed, say=say)
    say(f"wrote {len(digests)} data sets and models to {arguments.out}")
    print(json.dumps(digests, sort_keys=True))
    return 0


def _annotate(arguments: argparse.Namespace) -> int:
    try:
        pairs = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines()]
        rng, panel = random.Random(f"{arguments.seed}/annotate"), careful_panel("careful")
        rows = annotate(rng, pairs, panel, name=arguments.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{arguments.pairs}: {error}; give what rlhf_trainer.collect wrote", file=sys.stderr)
        return 2
    write_rows(arguments.out, rows)
    return 0


def _judge_answers(arguments: argparse.Namespace) -> int:
    try:
        print(json.dumps(summary(count_answers(arguments.answers))))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    for folder in (arguments.policy, arguments.against):
        if not (folder / "config.json").is_file():
            print(f"{folder} is not a model folder (no config.json); give the artifact's folder", file=sys.stderr)
            return 2
    report = judge(arguments.policy, arguments.against, samples=arguments.samples, seed=arguments.seed)
    print(json.dumps(report.as_dict()))
    return 0


_COMMANDS = {"generate": _generate, "annotate": _annotate, "judge": _judge, "judge-answers": _judge_answers}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_trainer.desk", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write models, feedback and digests.json")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--seed", type=int, default=0)
    label = commands.add_parser("annotate", help="careful raters compare pairs that rlhf_trainer.collect wrote")
    label.add_argument("--pairs", type=Path, required=True)
    label.add_argument("--out", type=Path, required=True)
    label.add_argument("--name", default="collected", help="prefix of the annotations' ids")
    label.add_argument("--seed", type=int, default=0)
    compare = commands.add_parser("judge", help="the oracle's report of one policy against another")
    compare.add_argument("--policy", type=Path, required=True)
    compare.add_argument("--against", type=Path, required=True)
    compare.add_argument("--samples", type=int, default=400)
    compare.add_argument("--seed", type=int, default=0)
    count = commands.add_parser("judge-answers", help="the oracle's count of leaks in recorded answers")
    count.add_argument("--answers", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
