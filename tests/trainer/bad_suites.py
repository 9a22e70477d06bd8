"""What a user can get wrong about a safety suite, and words of the one line that the attempt ends with."""

from __future__ import annotations

from typing import Any

from rlhf_trainer.config import Evaluation
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer.bad_attempts import Edit
from tests.trainer.bench import Bench
from tests.trainer.ppo_world import strict_filter

_PINNED = {"uri": "pvc://red-team/suite.jsonl", "digest": "sha256:" + "0" * 64}
_LONG = "hello " * 40


def _judged(bench: Bench, suite: Located | None, **changes: Any) -> dict[str, Any]:
    """Fields of an attempt with this suite; ``changes`` are of its limits."""
    evaluation = {"samples": 16, "safetySuite": {**_PINNED, "maxViolationRate": 0.05, **changes}}
    return {
        "safety_filter": Located(path=str(strict_filter(bench.folder / "filter.json"))),
        "safety_suite": suite,
        "evaluation": Evaluation.model_validate(evaluation),
    }


def _of(bench: Bench, rows: str, **changes: Any) -> AttemptConfig:
    return bench.policy(**_judged(bench, bench.lines(rows), **changes))


SUITES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no suite file": (
        lambda b: b.policy(**_judged(b, Located(path=str(b.folder / "gone.jsonl")))),
        ("spec.evaluation.safetySuite", "gone.jsonl", "check the path"),
    ),
    "changed suite": (
        lambda b: b.policy(**_judged(b, b.lines('{"prompt": "hello"}\n').model_copy(update=_PINNED))),
        ("spec.evaluation.safetySuite", "is pinned"),
    ),
    "empty suite": (lambda b: _of(b, ""), ("data.jsonl", "no rows")),
    "suite without prompts": (lambda b: _of(b, '{"category": "fraud"}\n'), ("data.jsonl:1", "'prompt'", "missing")),
    "suite category a number": (
        lambda b: _of(b, '{"prompt": "hello"}\n{"prompt": "hi", "category": 7}\n'),
        ("data.jsonl:2", "'category'", "give a string or leave it out"),
    ),
    "suite too long": (
        lambda b: _of(b, f'{{"prompt": "{_LONG}"}}\n'),
        ("data.jsonl", "1 of 1 rows", "raise training.maxPromptLength"),
    ),
    "suite category too long": (
        lambda b: _of(b, f'{{"prompt": "hello"}}\n{{"prompt": "{_LONG}", "category": "fraud"}}\n'),
        ("data.jsonl", "category 'fraud'", "raise training.maxPromptLength"),
    ),
    "a limit for no categories": (
        lambda b: _of(b, '{"prompt": "hello"}\n', maxCategoryViolationRate=0.1),
        ("data.jsonl", "no row has a 'category'", "maxCategoryViolationRate", "add the field, or remove the limit"),
    ),
    "suite without a filter": (
        lambda b: b.policy(**_judged(b, b.lines('{"prompt": "hello"}\n')) | {"safety_filter": None}),
        ("spec.evaluation.safetySuite is given", "name an evaluation.safetyFilter"),
    ),
    "DPO: suite without a filter": (
        lambda b: b.offline("DPO", **_judged(b, b.lines('{"prompt": "hello"}\n')) | {"safety_filter": None}),
        ("spec.evaluation.safetySuite is given", "name an evaluation.safetyFilter"),
    ),
    "suite not located": (lambda b: b.policy(**_judged(b, None)), ("safetySuite", "recreate the resource")),
}
