"""Intervals behind the verdicts: every estimate comes with what the sample can and cannot rule out.

Quantiles come from scipy.special: importing scipy.stats would add about two seconds to the start of every rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special


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
    """Mean of values in [0, 1] that depend on each other within clusters (several answers to one prompt).

    The cluster-robust variance (Liang and Zeger 1986, with the G/(G-1) correction) gives an effective sample size;
    the Wilson interval at that size stays inside [0, 1] and has width even where every value is the same
    (Korn and Graubard 1998). Student's t on G-1 degrees of freedom stands in for the normal.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters: one cluster per value, at least one")
    mean = float(np.mean(values))
    residuals: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    groups = len(residuals)
    if groups < 2:
        return Interval(len(values), mean, 0.0, 1.0)
    variance = groups / (groups - 1) * sum(r * r for r in residuals.values()) / len(values) ** 2
    spread = mean * (1 - mean)
    effective = spread / variance if variance > 1e-12 and spread > 0 else float(groups)
    return _wilson(mean, effective, float(special.stdtrit(groups - 1, 0.5 + confidence / 2)), len(values))


def spearman(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Rank correlation with Fisher's z and the variance of Bonett and Wright (2000)."""
    n = len(first)
    if n < 4:
        raise ValueError(f"{n} pairs: a rank correlation needs at least 4")
    if any(len(set(side)) == 1 or np.isnan(side).any() for side in (first, second)):  # it orders nothing
        return Interval(n, 0.0, -1.0, 1.0)
    rho = float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])
    centre = math.atanh(max(-0.999999, min(0.999999, rho)))
    reach = float(special.ndtri(0.5 + confidence / 2)) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return Interval(n, rho, math.tanh(centre - reach), math.tanh(centre + reach))


def needed_for_margin(interval: Interval, threshold: float) -> int | None:
    """Further samples until the interval would clear ``threshold`` if the estimate stays; None when it sits on it.

    Widths shrink with the square root of the sample size, so the ratio of half-width to margin, squared, is the factor.
    """
    margin = interval.estimate - threshold
    if abs(margin) < 1e-9:
        return None
    reach = interval.estimate - interval.lower if margin > 0 else interval.upper - interval.estimate
    return max(1, math.ceil(interval.n * (reach / margin) ** 2) - interval.n)


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
