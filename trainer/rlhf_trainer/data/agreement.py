"""How far raters agree beyond chance: Krippendorff's alpha and Cohen's kappa, both with bootstrap intervals.

The unit is a pair of responses; its labels are numbers (1: the first in canonical order is better, 0.5: tie, 0: the
second). Everything a statistic needs is a sum over units, so a bootstrap is one matrix product: units of one prompt are
drawn together, because answers to one question are alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
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
    estimate = statistic(counts.sum(axis=0))
    if estimate is None:
        return None
    return _interval(_units_with_two(labels), estimate, counts, clusters, statistic, seed)


def mean_cohen_kappa(labels: Sequence[Label], seed: int = 0) -> Interval | None:
    """Cohen's kappa (1960) of every two raters on the units both labelled, averaged by the number of those units.

    ``n`` counts the units. None when no two raters share a unit, or none of their kappas is defined.
    """
    tables, clusters, shape = _confusions(labels)
    if not len(tables):
        return None

    def statistic(total: Floats) -> float | None:
        return _mean_kappa(total.reshape(shape))

    estimate = statistic(tables.sum(axis=0))
    if estimate is None:
        return None
    return _interval(_units_with_two(labels), estimate, tables, clusters, statistic, seed)


def raw_agreement(labels: Sequence[Label]) -> tuple[int, float] | None:
    """(pairs of labels, share of them that are equal) over all units; None without any."""
    same = total = 0
    for own in _by_unit(labels).values():
        for first, second in combinations(own, 2):
            total += 1
            same += first.value == second.value
    return (total, same / total) if total else None


def noise_ceiling(agreement: float) -> float:
    """The best accuracy against one noisy label that agreement p of two labels allows: (1 + sqrt(2p - 1)) / 2.

    Two labels that are each right with probability q agree with q^2 + (1 - q)^2. Lower if pairs differ in difficulty.
    """
    return 0.5 * (1 + math.sqrt(max(0.0, 2 * agreement - 1)))


def _by_unit(labels: Sequence[Label]) -> dict[Hashable, list[Label]]:
    """Labels by unit: the first of each rater, since a rater's second answer says nothing about others."""
    units: dict[Hashable, dict[Hashable, Label]] = defaultdict(dict)
    for label in labels:
        units[label.unit].setdefault(label.rater, label)
    return {unit: list(own.values()) for unit, own in units.items()}


def _units_with_two(labels: Sequence[Label]) -> int:
    return sum(len(own) > 1 for own in _by_unit(labels).values())


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


def _confusions(labels: Sequence[Label]) -> tuple[Floats, list[Hashable], tuple[int, int, int]]:
    """Per unit and pair of raters the cell of their confusion table: [U, P * K * K], clusters [U], (P, K, K)."""
    place = {value: index for index, value in enumerate(sorted({label.value for label in labels}))}
    size = len(place)
    units = [sorted(own, key=lambda label: str(label.rater)) for own in _by_unit(labels).values() if len(own) > 1]
    pairs: dict[tuple[Hashable, Hashable], int] = {}
    cells = [
        (unit, pairs.setdefault((first.rater, second.rater), len(pairs)), place[first.value], place[second.value])
        for unit, own in enumerate(units)
        for first, second in combinations(own, 2)
    ]
    tables = np.zeros((len(units), len(pairs), size, size))
    if cells:
        np.add.at(tables, tuple(np.array(cells).T), 1.0)
    return tables.reshape(len(units), -1), [own[0].cluster for own in units], (len(pairs), size, size)


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


def _interval(
    n: int,
    estimate: float,
    sums: Floats,
    clusters: Sequence[Hashable],
    statistic: Callable[[Floats], float | None],
    seed: int,
) -> Interval:
    """Percentile interval over resampled clusters; ``sums`` [U, ...] add up to what the statistic is made of."""
    numbers: dict[Hashable, int] = {}
    owner = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    if len(numbers) < 2:
        return Interval(n, estimate, -1.0, 1.0)
    grouped = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(grouped, owner, sums)
    drawn = generator(seed, Stream.EVALUATION).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), size=_RESAMPLES
    )
    resampled = [found for total in drawn @ grouped if (found := statistic(total)) is not None]
    if not resampled:
        return Interval(n, estimate, -1.0, 1.0)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(n, estimate, min(float(low), estimate), max(float(high), estimate))
