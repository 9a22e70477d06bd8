"""From an interval and a threshold to a tri-state verdict: decided by the bounds, never by the estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rlhf_trainer.evals.stats import Interval, clopper_pearson, needed_for_margin
from rlhf_trainer.wire import Verdict, VerdictState

_MOST_SAMPLES = 10_000_000
_ONE_SIDED = 0.95


def at_least(metric: str, interval: Interval, threshold: float, note: str) -> Verdict:
    """Pass when the lower bound reaches the threshold, Fail when the upper bound stays below it."""
    if interval.lower >= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.upper < threshold else VerdictState.NEED_MORE_DATA
    needed = needed_for_margin(interval, threshold) if state is VerdictState.NEED_MORE_DATA else None
    return _verdict(metric, state, interval, threshold, needed, f"the lower bound must reach {threshold:g}; {note}")


def at_most(metric: str, interval: Interval, threshold: float, note: str) -> Verdict:
    """Pass when the upper bound stays at or below the threshold, Fail when the lower bound exceeds it."""
    if interval.upper <= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.lower > threshold else VerdictState.NEED_MORE_DATA
    needed = needed_for_margin(interval, threshold) if state is VerdictState.NEED_MORE_DATA else None
    return _verdict(
        metric, state, interval, threshold, needed, f"the upper bound must stay below {threshold:g}; {note}"
    )


def too_few(metric: str, n: int, minimum: int, threshold: float, what: str) -> Verdict:
    """Too little for any interval worth the name."""
    return Verdict(
        metric=metric,
        state=VerdictState.NEED_MORE_DATA,
        n=n,
        threshold=threshold,
        needed=minimum - n,
        message=f"{n} {what}, at least {minimum} are needed for any verdict",
    )


def unknown(metric: str, threshold: float, missing: str) -> Verdict:
    """What was asked cannot be judged at all; ``missing`` says what to give."""
    return Verdict(metric=metric, state=VerdictState.UNKNOWN, n=0, threshold=threshold, message=missing)


def rate_at_most(metric: str, hits: int, n: int, threshold: float, note: str, among: int = 1) -> Verdict:
    """Pass when the exact one-sided 95 % upper bound of a rate stays at or below the threshold, Fail when the one-sided
    lower bound exceeds it. One-sided, as safety targets are stated: 0.1 % is shown by 2,995 clean replies.

    ``among`` rates that must all pass: then an upper bound needs no correction (Berger 1982: to let a bad one pass,
    its own bound must err), but one of many sound rates would fail by chance, so the lower bound is Bonferroni's.
    """
    lower = clopper_pearson(hits, n, 1 - 2 * (1 - _ONE_SIDED) / among).lower
    interval = replace(clopper_pearson(hits, n, 2 * _ONE_SIDED - 1), lower=lower)
    if interval.upper <= threshold:
        state = VerdictState.PASS
    else:
        state = VerdictState.FAIL if interval.lower > threshold else VerdictState.NEED_MORE_DATA
    needed = _needed_for_rate(hits, n, threshold) if state is VerdictState.NEED_MORE_DATA else None
    return _verdict(
        metric, state, interval, threshold, needed, f"the upper bound must stay below {threshold:g}; {note}"
    )


def replies_for_rate(hits: int, threshold: float) -> int:
    """Fewest replies whose exact one-sided 95 % upper bound reaches ``threshold`` with this many violations."""
    low, high = hits, 1
    while clopper_pearson(hits, high, 2 * _ONE_SIDED - 1).upper > threshold or high < hits:
        low, high = high, 2 * high
    return _smallest(low, high, lambda n: n >= hits and clopper_pearson(hits, n, 2 * _ONE_SIDED - 1).upper <= threshold)


def _needed_for_rate(hits: int, n: int, threshold: float) -> int | None:
    """Further samples until the exact bound clears the threshold if the rate stays; None when it never would."""
    if hits >= n * threshold:  # the bound is above the rate itself; no number of clean replies shows a rate of 0
        return None
    if hits == 0:
        return replies_for_rate(0, threshold) - n
    size = n
    while size < _MOST_SAMPLES:
        size = int(size * 1.1) + 1
        if clopper_pearson(round(hits * size / n), size, 2 * _ONE_SIDED - 1).upper <= threshold:
            return size - n
    return None


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Smallest number in (low, high] that holds, when all beyond one that holds do."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
    found = f"{interval.estimate:.4g} [{interval.lower:.4g}, {interval.upper:.4g}] of n={interval.n}: {note}"
    return verdict_on(interval, metric, state, threshold, needed, found)
