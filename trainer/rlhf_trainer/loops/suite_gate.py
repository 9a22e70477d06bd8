"""The gate's safety suite: the policy that will be published answers every prompt, and the safety filter judges."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_trainer.evals.safety_suite import CATEGORY, TOTAL, Attacked, counts, verdicts
from rlhf_trainer.generate.base import Generator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.replies import judged_replies
from rlhf_trainer.loops.suite_inputs import Suite
from rlhf_trainer.randomness import Stream
from rlhf_trainer.safety.scorer import LinearFilter
from rlhf_trainer.wire import Verdict

UNSAFE_FILE = "unsafe-replies.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unsafe:
    """What a red team looks at next."""

    prompt: str
    category: str
    response: str


def judge_suite(
    session: Session, inputs: PolicyInputs, sampler: Generator
) -> tuple[tuple[Verdict, ...], dict[str, float]]:
    """Verdicts and figures, none without a suite. Collective.

    Rank 0 keeps the unsafe replies in the attempt's folder; a status is read by too many for such texts.
    """
    suite, located = inputs.suite, session.config.safety_filter
    if suite is None or located is None:  # a suite without a filter has been refused
        return (), {}
    refuses = LinearFilter.read(Path(located.path)).violates
    samples = suite.wanted.samples_per_prompt
    prompts = [prompt for prompt in suite.prompts for _ in range(samples)]

    def unsafe(_prompts: Sequence[str], replies: Sequence[str]) -> list[str | None]:
        return [reply if refuses(reply) else None for reply in replies]

    found = judged_replies(session, inputs, Stream.SAFETY_SUITE, sampler, prompts, unsafe)
    drawn = [found[start : start + samples] for start in range(0, len(found), samples)]
    if session.world.is_main:
        _keep(session.folder / UNSAFE_FILE, _unsafe(suite, drawn))
    attacked = [
        Attacked(category, any(reply is not None for reply in replies))
        for category, replies in zip(suite.categories, drawn, strict=True)
    ]
    return verdicts(attacked, suite.wanted, suite.caveats), _figures(suite, attacked)


def _figures(suite: Suite, attacked: Sequence[Attacked]) -> dict[str, float]:
    whole, parts = counts(attacked)
    return {
        TOTAL: whole.rate,
        CATEGORY: max(part.rate for part in parts.values()),
        "suiteTooLong": float(suite.too_long),
        "suiteTrainedOn": float(suite.trained_on),
    }


def _unsafe(suite: Suite, drawn: Sequence[Sequence[str | None]]) -> Iterable[Unsafe]:
    for prompt, category, replies in zip(suite.prompts, suite.categories, drawn, strict=True):
        yield from (Unsafe(prompt.text, category, reply) for reply in replies if reply is not None)


def _keep(path: Path, replies: Iterable[Unsafe]) -> None:
    """The verdict does not hang on the file: a full disk is reported, and refuses nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in replies), encoding="utf-8")
    except OSError as error:
        log.warning("%s: the unsafe replies are not kept (%s); the verdict stands", path, error)
