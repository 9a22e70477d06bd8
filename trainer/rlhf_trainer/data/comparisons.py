"""Which of two models do people prefer: win rates from annotations that name who wrote the responses.

Models' ratings do not count: they are often paired by who won. Labels arrive over weeks and whoever waits for them
looks again and again, so the interval holds at every look (see ``evals/sequential.py``). Each prompt counts once, by
its first label: later ones of the same prompt are not independent of it, and choosing among them after the fact would
be a choice by result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime

from rlhf_trainer.data.annotation import Annotation
from rlhf_trainer.data.rows import UNKNOWN
from rlhf_trainer.data.text import normal
from rlhf_trainer.evals.sequential import anytime_interval, needed_to_exceed
from rlhf_trainer.evals.verdicts import verdict_on
from rlhf_trainer.wire import Verdict, VerdictState

METRIC = "humanWinRate"
ALPHA = 0.05
_RESULTS = {"a": 1.0, "tie": 0.5, "both_bad": 0.5, "b": 0.0}
_NOT_ASKED = ("model", "rule")
_LAST = datetime.max.replace(tzinfo=UTC)


def model_verdicts(annotations: Sequence[Annotation]) -> tuple[Verdict, ...]:
    """For every two models that were compared, of the one that is ahead: is it better than a coin against the other?"""
    first_labels: dict[tuple[str, str], dict[str, Annotation]] = defaultdict(dict)
    for each in sorted(annotations, key=lambda one: (one.created_at or _LAST, one.row)):
        named = UNKNOWN not in (each.model_a, each.model_b) and each.model_a != each.model_b
        if named and each.rater_type not in _NOT_ASKED:
            models = (min(each.model_a, each.model_b), max(each.model_a, each.model_b))
            first_labels[models].setdefault(normal(each.prompt), each)
    return tuple(_verdict(*models, tuple(own.values())) for models, own in sorted(first_labels.items()))


def _verdict(first: str, second: str, labels: Sequence[Annotation]) -> Verdict:
    """Either side may be ahead, so each is held to alpha / 2."""
    results = [_result(each, first) for each in labels]
    if 2 * sum(results) < len(results):
        first, second, results = second, first, [1.0 - result for result in results]
    interval = anytime_interval(results, ALPHA)
    shown = interval.lower > 0.5
    needed = None if shown else needed_to_exceed(results, 0.5, ALPHA / 2)
    state = VerdictState.PASS if shown else VerdictState.NEED_MORE_DATA
    found = f"{interval.estimate:.3f} [{interval.lower:.3f}, {interval.upper:.3f}] over {interval.n} prompts"
    message = f"{short(first)} against {short(second)}: {found} at any time, {_order(labels, first)}"
    return verdict_on(interval, f"{METRIC}/{short(first)}", state, 0.5, needed, message)


def _result(each: Annotation, model: str) -> float:
    result = _RESULTS[each.preference]
    return result if each.model_a == model else 1.0 - result


def _order(labels: Sequence[Annotation], model: str) -> str:
    """A habit of choosing what is shown first cancels where either side comes first as often."""
    known = [each for each in labels if each.shown_first is not None]
    if not known:
        return "order unknown"
    first = sum((each.model_a if each.shown_first == "a" else each.model_b) == model for each in known)
    return f"shown first {first} times of {len(known)}"


def short(model: str) -> str:
    """A digest is known by its first digits."""
    return model[:19] if model.startswith("sha256:") else model[:60]
