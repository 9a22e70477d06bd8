"""`python -m rlhf_operator.generate [--check]`: writes the generated files, or says which would change."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

from rlhf_operator.generate.outputs import outputs
from rlhf_operator.kinds import KINDS

# Files of a kind that is gone must go too; everything in these folders is generated.
_OWNED = ("crds/*.yaml", "helm/rlhf-operator-crds/templates/*.yaml", "helm/rlhf-operator/files/*.yaml")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_operator.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and show the difference if any")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: this folder)")
    options = parser.parse_args(arguments)
    if not (options.root / "crds").is_dir():
        parser.error(f"{options.root} is not the repository: it has no folder crds (see --root)")
    wanted = outputs(KINDS)
    if options.check:
        difference = differences(options.root, wanted)
        sys.stdout.write(difference)
        if difference:
            print("generated files differ from the code: run `make generate` and commit", file=sys.stderr)
        return 1 if difference else 0
    write(options.root, wanted)
    return 0


def differences(root: Path, wanted: Mapping[str, str]) -> str:
    """A unified diff from what is there to what should be; empty when nothing differs."""
    lines: list[str] = []
    for path in sorted(wanted.keys() | _existing(root)):
        file = root / path
        old = file.read_text() if file.exists() else ""
        lines += difflib.unified_diff(old.splitlines(True), wanted.get(path, "").splitlines(True), path, path)
    return "".join(lines)


def write(root: Path, wanted: Mapping[str, str]) -> None:
    for stale in _existing(root) - wanted.keys():
        (root / stale).unlink()
    for path, text in wanted.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            print(f"wrote {path}")


def _existing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for pattern in _OWNED for path in root.glob(pattern)}


if __name__ == "__main__":
    sys.exit(main())
