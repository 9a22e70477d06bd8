"""How far raters agree beyond chance: Krippendorff's alpha and Cohen's kappa, both with bootstrap intervals.

The unit is a pair of responses; its labels are numbers (1: the first in canonical order is better, 0.5: tie, 0: the
second). Everything a statistic needs is a weighted sum over units, so a resample is a vector of weights; units of one
prompt are drawn together, because answers to one question are alike.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np
import numpy.typing as npt

from rlhf_trainer.evals.stats import Interval
from rlhf_trainer.randomness import Stream, generator

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Label:
    """One rater's value for one unit; ``cluster`` is what units share (the prompt)."""

    unit: Hashable
    rater: Hashable
    value: float
    cluster: Hashable


class Metric(StrEnum):
    """The difference of two values in alpha: any, by rank, or squared distance."""

    NOMINAL = "nominal"
    ORDINAL = "ordinal"
    INTERVAL = "interval"


def krippendorff_alpha(labels: Sequence[Label], metric: Metric = Metric.NOMINAL, seed: int = 0) -> Interval | None:
    """Alpha (Krippendorff 2011, "Computing Krippendorff's alpha-reliability") with a 95% bootstrap interval over
    clusters; ``n`` counts units with two labels or more. Missing labels need no care.

    None when no unit has two labels, or all labels are the same: there is nothing to agree about.
    """
    values, clusters, counts = _coincidences(labels)
    if not len(counts):
        return None
    statistic = _alpha_of(values, metric)
    owner = _numbered(clusters)
    grouped = np.zeros((owner.max() + 1, counts.shape[1]))
    np.add.at(grouped, owner, counts)
    return _interval(len(counts), len(grouped), lambda weights: statistic(weights @ grouped), seed)


def mean_cohen_kappa(labels: Sequence[Label], seed: int = 0) -> Interval | None:
    """Cohen's kappa (1960) of every two raters on the units both labelled, averaged by the number of those units.

    ``n`` counts the units. None when no two raters share a unit, or none of their kappas is defined.
    """
    cells, clusters, shape = _confusions(labels)
    if not len(cells):
        return None
    owner = _numbered(clusters)

    def statistic(weights: Floats) -> float | None:
        tables: Floats = np.bincount(cells, weights=weights[owner], minlength=math.prod(shape)).astype(np.float64)
        return _mean_kappa(tables.reshape(shape))

    units = sum(len(own) > 1 for own in _by_unit(labels).values())
    return _interval(units, int(owner.max()) + 1, statistic, seed)


def raw_agreement(labels: Sequence[Label]) -> tuple[int, float] | None:
    """(pairs of labels, share of them that are equal) over all units; None without any."""
    same = total = 0
    for own in _by_unit(labels).values():
        total += math.comb(len(own), 2)
        same += sum(math.comb(count, 2) for count in Counter(label.value for label in own).values())
    return (total, same / total) if total else None


def noise_ceiling(agreement: float) -> float:
    """The best accuracy against one noisy label that agreement p of two labels allows: (1 + sqrt(2p - 1)) / 2.

    Two labels that are each right with probability q agree with q^2 + (1 - q)^2. Lower if pairs differ in difficulty.
    """
    return 0.5 * (1 + math.sqrt(max(0.0, 2 * agreement - 1)))


def first_answers(labels: Sequence[Label]) -> list[Label]:
    """The first label of each rater on each unit: a second answer says nothing about others, and is no second voice."""
    found: dict[tuple[Hashable, Hashable], Label] = {}
    for label in labels:
        found.setdefault((label.unit, label.rater), label)
    return list(found.values())


def _by_unit(labels: Sequence[Label]) -> dict[Hashable, list[Label]]:
    units: dict[Hashable, list[Label]] = defaultdict(list)
    for label in first_answers(labels):
        units[label.unit].append(label)
    return units


def _coincidences(labels: Sequence[Label]) -> tuple[Floats, list[Hashable], Floats]:
    """Values [K], the cluster of each unit with two labels [U] and its coincidence matrix [U, K * K]."""
    values = np.unique([label.value for label in labels]) if labels else np.zeros(0)
    place = {value: index for index, value in enumerate(values.tolist())}
    clusters: list[Hashable] = []
    matrices: list[Floats] = []
    for own in _by_unit(labels).values():
        if len(own) < 2:
            continue
        counts = np.bincount([place[label.value] for label in own], minlength=len(values)).astype(np.float64)
        matrices.append((np.outer(counts, counts) - np.diag(counts)).ravel() / (len(own) - 1))
        clusters.append(own[0].cluster)
    return values, clusters, np.array(matrices)


def _alpha_of(values: Floats, metric: Metric) -> Callable[[Floats], float | None]:
    size = len(values)

    def alpha(total: Floats) -> float | None:
        coincidence = total.reshape(size, size)
        marginal = coincidence.sum(axis=0)
        distance = _distances(values, marginal, metric)
        n = marginal.sum()
        expected = (np.outer(marginal, marginal) * distance).sum() / (n - 1)
        return None if expected <= 0 else float(1 - (coincidence * distance).sum() / expected)

    return alpha


def _distances(values: Floats, marginal: Floats, metric: Metric) -> Floats:
    if metric is Metric.INTERVAL:
        return np.subtract.outer(values, values) ** 2
    if metric is Metric.NOMINAL:
        return 1.0 - np.eye(len(values))
    below = np.cumsum(marginal) - marginal / 2  # the middle rank of each value
    return np.subtract.outer(below, below) ** 2


def _confusions(labels: Sequence[Label]) -> tuple[npt.NDArray[np.intp], list[Hashable], tuple[int, int, int]]:
    """For every two labels of a unit the cell of their raters' confusion table and its cluster; shape (P, K, K)."""
    place = {value: index for index, value in enumerate(sorted({label.value for label in labels}))}
    size = len(place)
    pairs: dict[tuple[Hashable, Hashable], int] = {}
    cells: list[int] = []
    clusters: list[Hashable] = []
    for own in _by_unit(labels).values():
        for first, second in combinations(sorted(own, key=lambda label: str(label.rater)), 2):
            pair = pairs.setdefault((first.rater, second.rater), len(pairs))
            cells.append((pair * size + place[first.value]) * size + place[second.value])
            clusters.append(first.cluster)
    return np.array(cells, dtype=np.intp), clusters, (len(pairs), size, size)


def _mean_kappa(tables: Floats) -> float | None:
    sizes = tables.sum(axis=(1, 2))
    tables, sizes = tables[sizes > 0], sizes[sizes > 0]
    observed = np.trace(tables, axis1=1, axis2=2) / sizes
    expected = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / sizes**2
    defined = expected < 1 - 1e-12
    if not defined.any():
        return None
    kappas = (observed[defined] - expected[defined]) / (1 - expected[defined])
    return float(np.average(kappas, weights=sizes[defined]))


def _numbered(clusters: Sequence[Hashable]) -> npt.NDArray[np.intp]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)


def _interval(n: int, clusters: int, statistic: Callable[[Floats], float | None], seed: int) -> Interval | None:
    """Percentile interval of a statistic of cluster weights: all ones is the estimate, multinomial draws a resample."""
    estimate = statistic(np.ones(clusters))
    if estimate is None:
        return None
    drawn = generator(seed, Stream.EVALUATION).multinomial(clusters, np.full(clusters, 1 / clusters), size=_RESAMPLES)
    resampled = [found for weights in drawn.astype(np.float64) if (found := statistic(weights)) is not None]
    if clusters < 2 or not resampled:
        return Interval(n, estimate, -1.0, 1.0)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(n, estimate, min(float(low), estimate), max(float(high), estimate))
