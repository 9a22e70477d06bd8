"""Do the tests of the algorithms notice a flipped sign, a moved bound, a dropped mask, another normaliser?

mutmut changes one thing at a time in ``rlhf_trainer/algos`` and runs the tests that reach it; a mutant that no test
notices has survived. The result lists every survivor with its change, so that a reader can judge it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.report import Report

ROOT = Path(__file__).resolve().parent.parent
FIELD = ROOT / ".build" / "mutation"
# Pure and fast: what launches processes or trains for long is not for thousands of runs.
TESTS = (
    "test_advantages.py",
    "test_algos.py",
    "test_bandit_optimum.py",
    "test_bradley_terry.py",
    "test_distillation.py",
    "test_estimators.py",
    "test_lagrangian.py",
    "test_preference_losses.py",
    "test_supervised.py",
)
PROJECT = """
[tool.mutmut]
source_paths = ["rlhf_trainer"]
only_mutate = ["rlhf_trainer/algos/*.py"]
pytest_add_cli_args_test_selection = ["tests/trainer"]
also_copy = ["tests", "sandbox"]

[tool.pytest.ini_options]
pythonpath = ["."]
asyncio_mode = "auto"
addopts = "--import-mode=importlib"
"""
KILLED, SURVIVED, UNREACHED, TIMED_OUT, OTHER = "killed", "survived", "no test reaches it", "timed out", "other"
_MEANING = {0: SURVIVED, 1: KILLED, 3: KILLED, 33: UNREACHED, 36: TIMED_OUT, 24: TIMED_OUT, -24: TIMED_OUT}


def main() -> int:
    prepare()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    children = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", children]
    done = subprocess.run(command, cwd=FIELD, env=environment, check=False)
    outcomes = read_outcomes()
    if not outcomes:
        print(f"mutmut tried nothing (exit code {done.returncode}); see {FIELD}", file=sys.stderr)
        return 1
    write(outcomes, environment)
    return 0


def prepare() -> None:
    """A project of the trainer and its algorithm tests alone, anew: mutmut mutates a copy, never the checkout."""
    shutil.rmtree(FIELD, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trainer" / "rlhf_trainer", FIELD / "rlhf_trainer", ignore=ignore)
    tests = FIELD / "tests" / "trainer"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "__init__.py", tests.parent)
    for path in sorted((ROOT / "tests" / "trainer").glob("*.py")):
        if path.name in TESTS or not path.name.startswith("test_"):
            shutil.copy(path, tests)
    shutil.copytree(ROOT / "sandbox", FIELD / "sandbox", ignore=ignore)  # whose locks the tests' servers take
    (FIELD / "pyproject.toml").write_text(PROJECT)


def read_outcomes() -> dict[str, str]:
    """mutant → what became of it"""
    found: dict[str, str] = {}
    for path in sorted((FIELD / "mutants").rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        found |= {name: _MEANING.get(code, OTHER) for name, code in codes.items() if code is not None}
    return found


def write(outcomes: dict[str, str], environment: dict[str, str]) -> None:
    report = Report("mutation", "Mutants of the algorithms", ("torch", "mutmut", "pytest"))
    counts = Counter(outcomes.values())
    report.add("mutants tried", len(outcomes), "1", samples=len(outcomes))
    for state in (KILLED, TIMED_OUT, SURVIVED, UNREACHED, OTHER):
        report.add(state, counts[state], "1", samples=len(outcomes))
    for name, state in outcomes.items():
        if state in (SURVIVED, UNREACHED):
            report.note(
                f"`{name.removeprefix('rlhf_trainer.algos.')}` {state}:\n\n```diff\n{change(name, environment)}\n```"
            )
    report.write()


def change(name: str, environment: dict[str, str]) -> str:
    """The changed lines of one mutant."""
    command = [sys.executable, "-m", "mutmut", "show", name]
    shown = subprocess.run(command, cwd=FIELD, env=environment, capture_output=True, text=True, check=False).stdout
    lines = (line for line in shown.splitlines() if line.startswith(("-", "+")))
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


if __name__ == "__main__":
    sys.exit(main())
