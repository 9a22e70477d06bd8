"""Intervals behind the verdicts: every estimate comes with what the sample can and cannot rule out.

Quantiles come from scipy.special: importing scipy.stats would add about two seconds to the start of every rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

_FEWEST_GROUPS = 1.5  # below it, one cluster is nearly all there is


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval (95 % unless said otherwise) around an estimate from ``n`` samples."""

    n: int
    estimate: float
    lower: float
    upper: float


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927); ``n`` may be an effective sample size."""
    return _wilson(successes / n, n, float(special.ndtri(0.5 + confidence / 2)), round(n))


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a proportion (Clopper and Pearson 1934): never covers less than promised."""
    tail = (1 - confidence) / 2
    lower = float(special.betaincinv(successes, n - successes + 1, tail)) if successes > 0 else 0.0
    upper = float(special.betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return Interval(n, successes / n, lower, upper)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """Mean of values in [0, 1] that depend on each other within clusters (several answers to one prompt)."""
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters: one cluster per value, at least one")
    mean = float(np.mean(values))
    sums = cluster_sums(np.asarray(values, dtype=np.float64)[:, None] - mean, clusters)
    variance = float(cluster_variance(sums)[0, 0]) / len(values) ** 2
    return robust_proportion(mean, variance, effective_groups(clusters), len(values), confidence)


def effective_groups(clusters: Sequence[Hashable]) -> float:
    """Clusters of one size that would be worth these (Kish 1965): their number where they are equal, near one where
    most values lie in one of them, whose spread the residuals cannot tell because the mean is its own."""
    sizes = np.array(list(Counter(clusters).values()), dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def robust_proportion(estimate: float, variance: float, groups: float, n: int, confidence: float = 0.95) -> Interval:
    """Interval of a share of [0, 1] from ``n`` values in ``groups`` clusters (`effective_groups`), whose estimate has
    this variance.

    The variance gives an effective sample size; the Wilson interval at that size stays inside [0, 1] and has width
    even where every value is the same (Korn and Graubard 1998). Student's t on groups - 1 degrees of freedom stands
    in for the normal.
    """
    quantile = _student(groups, confidence)
    if not math.isfinite(quantile):
        return Interval(n, estimate, 0.0, 1.0)
    spread = estimate * (1 - estimate)
    effective = spread / variance if variance > 1e-12 and spread > 0 else groups
    return _wilson(estimate, effective, quantile, n)


def clustered_student(values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """Mean of unbounded values that depend on each other within clusters; the whole line for one cluster."""
    mean = float(np.mean(values))
    sums = cluster_sums(np.asarray(values, dtype=np.float64)[:, None] - mean, clusters)
    quantile = _student(effective_groups(clusters), confidence)
    if not math.isfinite(quantile):
        return Interval(len(values), mean, -math.inf, math.inf)
    reach = quantile * math.sqrt(cluster_variance(sums)[0, 0]) / len(values)
    return Interval(len(values), mean, mean - reach, mean + reach)


def _student(groups: float, confidence: float) -> float:
    """Two-sided quantile of Student's t for a variance that ``groups`` clusters tell; infinite where that is one."""
    if groups < _FEWEST_GROUPS:
        return math.inf
    return float(special.stdtrit(groups - 1, 0.5 + confidence / 2))


def cluster_sums(scores: npt.NDArray[np.float64], clusters: Sequence[Hashable]) -> npt.NDArray[np.float64]:
    """Sum of the rows [N, P] of each cluster [G, P]."""
    index: dict[Hashable, int] = {}
    member = [index.setdefault(cluster, len(index)) for cluster in clusters]
    sums = np.zeros((len(index), scores.shape[1]))
    np.add.at(sums, member, scores)
    return sums


def cluster_variance(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Variance [P, P] of the total of independent clusters [G, P] whose mean is 0 (Liang and Zeger 1986, with the
    G/(G-1) correction)."""
    groups = len(sums)
    found: npt.NDArray[np.float64] = groups / max(1, groups - 1) * sums.T @ sums
    return found


def spearman(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Rank correlation with Fisher's z and the variance of Bonett and Wright (2000), at the effective sample size where
    values depend on each other within ``clusters`` (several responses to one prompt)."""
    n = len(first)
    if n < 4:
        raise ValueError(f"{n} pairs: a rank correlation needs at least 4")
    if any(len(set(side)) == 1 or np.isnan(side).any() for side in (first, second)):  # it orders nothing
        return Interval(n, 0.0, -1.0, 1.0)
    ranks = _ranks(first), _ranks(second)
    rho = float(np.corrcoef(*ranks)[0, 1])
    groups = n if clusters is None else effective_groups(clusters)
    effective = n / (1.0 if clusters is None else _design_effect(*ranks, clusters))
    if groups < _FEWEST_GROUPS or effective <= 3:
        return Interval(n, rho, -1.0, 1.0)
    centre = math.atanh(max(-0.999999, min(0.999999, rho)))
    tail = 0.5 + confidence / 2
    # Few prompts tell their own spread badly, which Student's t allows for; a prompt for each value is the normal case.
    quantile = float(special.ndtri(tail)) if groups == n else _student(groups, confidence)
    reach = quantile * math.sqrt((1 + rho * rho / 2) / (effective - 3))
    return Interval(n, rho, math.tanh(centre - reach), math.tanh(centre + reach))


def _design_effect(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], clusters: Sequence[Hashable]) -> float:
    """Variance of the correlation of x and y [N] by clusters over that of independent values, from their influences; at
    least 1."""
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    influence = x * y - float((x * y).mean()) * (x * x + y * y) / 2
    alone = float(influence @ influence)
    if alone < 1e-12:  # in perfect order, whose spread says nothing: only prompts count
        return len(x) / effective_groups(clusters)
    return max(1.0, float(cluster_variance(cluster_sums(influence[:, None], clusters))[0, 0]) / alone)


def pearson(first: Sequence[float], second: Sequence[float], draws: npt.NDArray[np.int64]) -> Interval:
    """Linear correlation with a 95 % percentile interval over ``draws`` [R, N] (see ``cluster_draws``).

    The bootstrap is asked because Fisher's interval for it holds for normal data only; scores seldom are.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return _percentile(_correlation(x, y, np.ones((1, len(x)))), _correlation(x, y, draws), draws, most=1.0)


def rank_correlation_gap(
    rewards: Sequence[float], scores: Sequence[float], other: Sequence[float], draws: npt.NDArray[np.int64]
) -> Interval:
    """|Spearman(rewards, other) - Spearman(scores, other)| with a 95 % interval: how much more (or less) the rewards
    follow ``other`` (length) than trusted scores of the same responses do.

    Both correlations are resampled together, because they share the responses; the ranks are kept.
    """
    r, s, o = (_ranks(values) for values in (rewards, scores, other))
    whole = np.ones((1, len(r)))
    signed = _percentile(
        _correlation(r, o, whole) - _correlation(s, o, whole),
        _correlation(r, o, draws) - _correlation(s, o, draws),
        draws,
        most=2.0,
    )
    return absolute(signed)


def absolute(signed: Interval) -> Interval:
    """The interval of |x| from that of x."""
    reach = max(abs(signed.lower), abs(signed.upper))
    closest = 0.0 if signed.lower <= 0 <= signed.upper else min(abs(signed.lower), abs(signed.upper))
    return Interval(signed.n, abs(signed.estimate), closest, reach)


def difference(first: Interval, second: Interval) -> Interval:
    """first - second of two independent proportions from their own intervals (Newcombe 1998, method 10)."""
    estimate = first.estimate - second.estimate
    below = math.hypot(first.estimate - first.lower, second.upper - second.estimate)
    above = math.hypot(first.upper - first.estimate, second.estimate - second.lower)
    return Interval(min(first.n, second.n), estimate, estimate - below, estimate + above)


def student_mean(values: Sequence[float] | npt.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean of independent unbounded values with Student's interval; at least two."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} values: a mean's interval needs at least 2")
    reach = (
        float(special.stdtrit(len(sample) - 1, 0.5 + confidence / 2)) * float(sample.std(ddof=1)) / len(sample) ** 0.5
    )
    return Interval(len(sample), float(sample.mean()), float(sample.mean()) - reach, float(sample.mean()) + reach)


def ratio_of_means(top: npt.NDArray[np.float64], bottom: npt.NDArray[np.float64]) -> Interval:
    """mean(top) / mean(bottom) of paired values with Fieller's 95 % interval (1954).

    Where the bottom's mean may be zero, the data say nothing about the ratio: the interval is the whole line.
    """
    n = len(top)
    t2 = float(special.stdtrit(n - 1, 0.975)) ** 2
    covariance = np.cov(top, bottom) / n
    a, b = float(top.mean()), float(bottom.mean())
    lead = b * b - t2 * covariance[1, 1]
    if lead <= 0:
        return Interval(n, a / b if b else 0.0, -math.inf, math.inf)
    middle = a * b - t2 * covariance[0, 1]
    reach = math.sqrt(max(0.0, middle * middle - lead * (a * a - t2 * covariance[0, 0])))
    return Interval(n, a / b, (middle - reach) / lead, (middle + reach) / lead)


def cluster_draws(
    clusters: Sequence[Hashable], generator: np.random.Generator, resamples: int = 1000
) -> npt.NDArray[np.int64]:
    """How often each value counts [R, N] in ``resamples`` bootstraps that draw whole clusters."""
    names = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([names[cluster] for cluster in clusters])
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counts: npt.NDArray[np.int64] = drawn[:, member]
    return counts


def needed_for_margin(interval: Interval, threshold: float) -> int | None:
    """Further samples until the interval would clear ``threshold`` if the estimate stays; None when it sits on it.

    Widths shrink with the square root of the sample size, so the ratio of half-width to margin, squared, is the factor.
    """
    margin = interval.estimate - threshold
    if abs(margin) < 1e-9:
        return None
    reach = interval.estimate - interval.lower if margin > 0 else interval.upper - interval.estimate
    if not math.isfinite(reach):
        return None
    return max(1, math.ceil(interval.n * (reach / margin) ** 2) - interval.n)


def _correlation(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], weights: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Weighted Pearson correlation of x and y [N] for each row of weights [R, N]; 0 where one of them is constant."""
    total = weights.sum(axis=1)
    mx, my = weights @ x / total, weights @ y / total
    vx, vy = weights @ (x * x) / total - mx * mx, weights @ (y * y) / total - my * my
    spread = np.sqrt(np.maximum(vx, 0.0) * np.maximum(vy, 0.0))
    covariance = weights @ (x * y) / total - mx * my
    result: npt.NDArray[np.float64] = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return result


def _percentile(
    estimate: npt.NDArray[np.float64], resampled: npt.NDArray[np.float64], draws: npt.NDArray[np.int64], most: float
) -> Interval:
    """Of what lies in [-most, most]; all of it where every draw is the sample itself, which is one cluster."""
    n = draws.shape[1]
    if (draws == 1).all():
        return Interval(n, float(estimate[0]), -most, most)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(n, float(estimate[0]), float(low), float(high))


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, sizes = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last: npt.NDArray[np.float64] = np.cumsum(sizes, dtype=np.float64)
    ranks: npt.NDArray[np.float64] = (last - (sizes - 1) / 2)[group]
    return ranks


def _wilson(estimate: float, n: float, z: float, count: int) -> Interval:
    centre = (estimate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(estimate * (1 - estimate) / n + z * z / (4 * n * n))
    return Interval(count, estimate, max(0.0, centre - reach), min(1.0, centre + reach))
