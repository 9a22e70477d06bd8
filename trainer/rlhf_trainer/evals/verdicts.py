"""From an interval and a threshold to a tri-state verdict: decided by the bounds, never by the estimate."""

from __future__ import annotations

from rlhf_trainer.evals.stats import Interval, clopper_pearson, needed_for_margin
from rlhf_trainer.wire import Verdict, VerdictState

_MOST_SAMPLES = 10_000_000


def at_least(metric: str, interval: Interval, threshold: float, note: str) -> Verdict:
    """Pass when the lower bound reaches the threshold, Fail when the upper bound stays below it."""
    if interval.lower >= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.upper < threshold else VerdictState.NEED_MORE_DATA
    needed = needed_for_margin(interval, threshold) if state is VerdictState.NEED_MORE_DATA else None
    return _verdict(metric, state, interval, threshold, needed, f"the lower bound must reach {threshold:g}; {note}")


def rate_at_most(metric: str, hits: int, n: int, threshold: float, note: str) -> Verdict:
    """Pass when the exact upper bound of a rate stays below the threshold, Fail when the lower bound exceeds it."""
    interval = clopper_pearson(hits, n)
    if interval.upper <= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.lower > threshold else VerdictState.NEED_MORE_DATA
    needed = _needed_for_rate(hits, n, threshold) if state is VerdictState.NEED_MORE_DATA else None
    return _verdict(
        metric, state, interval, threshold, needed, f"the upper bound must stay below {threshold:g}; {note}"
    )


def _needed_for_rate(hits: int, n: int, threshold: float) -> int | None:
    """Further samples until the exact bound clears the threshold if the rate stays; None when it never would."""
    size = n
    while size < _MOST_SAMPLES:
        size = int(size * 1.1) + 1
        if clopper_pearson(round(hits * size / n), size).upper <= threshold:
            return size - n
    return None


def verdict_on(
    interval: Interval, metric: str, state: VerdictState, threshold: float, needed: int | None, message: str
) -> Verdict:
    """A verdict with the evidence it rests on; the message ends with what is missing."""
    missing = f"; about {needed} more samples would decide" if needed else ""
    return Verdict(
        metric=metric,
        state=state,
        n=interval.n,
        estimate=interval.estimate,
        lower=interval.lower,
        upper=interval.upper,
        threshold=threshold,
        needed=needed,
        message=message + missing,
    )


def _verdict(
    metric: str, state: VerdictState, interval: Interval, threshold: float, needed: int | None, note: str
) -> Verdict:
    found = f"{interval.estimate:.4g} [{interval.lower:.4g}, {interval.upper:.4g}] on {interval.n} replies: {note}"
    return verdict_on(interval, metric, state, threshold, needed, found)
