"""``python -m rlhf_trainer``: what a person at a volume or a catalogue wants to know. No torch.

checkpoints RUN   the checkpoints of a run's folder, each read back and verified
metrics           every figure a trainer reports, as a Markdown table
data VERB FILE    validate, import, report on or diff preference data
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf_trainer.checkpoint import CheckpointRefused, published, read_manifest, verify
from rlhf_trainer.data import cli as data_cli
from rlhf_trainer.metrics import reference


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("checkpoints", help="verify the checkpoints of a run")
    inspect.add_argument("run", type=Path, help="<output>/<uid>, the folder that holds a1, a2, ...")
    commands.add_parser("metrics", help="print the catalogue of metrics")
    data_cli.add_parser(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command == "data":
        return data_cli.run(parsed)
    if parsed.command == "metrics":
        print(reference(), end="")
        return 0
    return inspect_checkpoints(parsed.run)


def inspect_checkpoints(run: Path) -> int:
    """Prints one line per checkpoint, furthest first; 0 when the first one verifies, so that a resume loses nothing."""
    paths = published(run)
    if not paths:
        print(f"{run}: no checkpoints; give the folder <output>/<uid> of a run", file=sys.stderr)
        return 2
    verdicts = [_describe(path) for path in paths]
    for _, line in verdicts:
        print(line)
    return 0 if verdicts[0][0] else 1


def _describe(path: Path) -> tuple[bool, str]:
    try:
        manifest = read_manifest(path)
        record = verify(path, manifest.config_digest).record
    except CheckpointRefused as refusal:
        return False, f"refused   {path}: {refusal}"
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    return (
        True,
        f"verified  {path}: attempt {record.attempt}, {ranks}, {record.time:%Y-%m-%d %H:%M:%SZ}, {record.digest}",
    )


if __name__ == "__main__":
    sys.exit(main())
