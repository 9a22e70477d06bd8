"""`python -m rlhf_trainer.safety train|eval`: make a safety filter, and measure one on other labels."""

from __future__ import annotations

import argparse
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_trainer.digests import RowError, dataset_digest, file_digest
from rlhf_trainer.safety.scorer import FormatError, LinearFilter
from rlhf_trainer.safety.train import DataError, Example, Recipe, measure, train
from rlhf_trainer.wire import ExitCode


def read_examples(path: Path) -> list[Example]:
    """Labelled answers of a JSONL file. Raises RowError naming file and line, OSError when unreadable."""
    examples: list[Example] = []
    # Bytes, not text: JSON may hold characters that Python takes for the end of a line, such as U+2028.
    for number, line in enumerate(path.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RowError(f"{path}:{number}: not JSON ({error})") from error
        response, violation = (row.get("response"), row.get("violation")) if isinstance(row, dict) else (None, None)
        if not isinstance(response, str) or not isinstance(violation, bool):
            raise RowError(f'{path}:{number}: needs "response" (a string) and "violation" (true or false)')
        examples.append(Example(response, violation))
    return examples


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_trainer.safety", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("train", help="train a filter on labelled answers")
    make.add_argument("--data", type=Path, required=True, help='JSONL: {"prompt", "response", "violation"}')
    make.add_argument("--out", type=Path, required=True, help="the filter file to write")
    make.add_argument("--max-false-positive-rate", type=float, default=Recipe.max_false_positive_rate)
    make.add_argument("--seed", type=int, default=0, help="draws the split")
    judge = commands.add_parser("eval", help="measure a filter on labelled answers")
    judge.add_argument("--filter", type=Path, required=True)
    judge.add_argument("--data", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one JSON document. Exit codes: 0, or 11 when the data or the filter cannot be used."""
    options = arguments().parse_args(argv)
    try:
        report = _train(options) if options.command == "train" else _evaluate(options)
    except (RowError, DataError, FormatError, OSError) as error:
        print(f"safety: {error}", file=sys.stderr)
        return int(ExitCode.INVALID)
    print(json.dumps(report))
    return int(ExitCode.SUCCESS)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    examples = read_examples(options.data)
    recipe = replace(Recipe(), max_false_positive_rate=options.max_false_positive_rate, seed=options.seed)
    model = train(examples, recipe, {"data": dataset_digest(options.data)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(model.to_json())
    return {"filter": str(options.out), "digest": file_digest(options.out), "measured": model.measured}


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    model = LinearFilter.read(options.filter)
    measured = measure(model, read_examples(options.data))
    return {
        "digest": file_digest(options.filter),
        "data": dataset_digest(options.data),
        "seen_in_training": model.lineage.get("data") == dataset_digest(options.data),
        "measured": measured.to_dict(),
    }


if __name__ == "__main__":
    sys.exit(main())
