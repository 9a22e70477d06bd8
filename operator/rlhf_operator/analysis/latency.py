"""Which answers are slow? The share of conversations above stable's 95th percentile.

Percentiles of several pods cannot be averaged, counts can: the threshold is a bucket bound, the smallest one above
which at most 5 % of stable's conversations lay before the counts that are judged with it, and both arms' shares above
it are then compared like any other rate, concurrently. So the comparison is as fine as the gateway's buckets: a
candidate that is slower within one bucket is not seen, and the threshold lies between stable's 95th percentile and
the next bound. Where users have been promised a limit, answers within it are never slow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

TAIL = 0.05
MIN_REFERENCE = 40  # stable conversations before a percentile means anything
MAX_REFERENCE = 4000  # then the reference is halved, so that it follows a drift


def threshold(reference: Sequence[int]) -> int | None:
    """Index of the first slow bucket given stable's histogram; None while it is too small to tell."""
    total = sum(reference)
    if total < MIN_REFERENCE:
        return None
    above = total
    for index, count in enumerate(reference):
        above -= count
        if above <= TAIL * total:
            return index + 1
    return len(reference)


def beyond(limit_ms: float, bounds_ms: Sequence[float]) -> int:
    """Index of the first bucket that holds nothing within the limit; between two bounds it counts as the upper."""
    return bisect_left(bounds_ms, limit_ms) + 1


def slow(buckets: Sequence[int], first_slow: int) -> int:
    return sum(buckets[first_slow:])


def remembered(reference: Sequence[int], buckets: Sequence[int]) -> tuple[int, ...]:
    """Stable's histogram with new counts, bounded by halving; other buckets than before start it again."""
    if len(reference) != len(buckets):
        return tuple(buckets)
    total = [old + new for old, new in zip(reference, buckets, strict=True)]
    return tuple(count // 2 for count in total) if sum(total) > MAX_REFERENCE else tuple(total)
