"""Train the builtin safety filter on labelled answers, and measure it on answers it has not seen.

Rows: {"prompt": str, "response": str, "violation": bool}. The split into training (60 %), threshold (20 %) and test
(20 %) goes by the normalised answer, so that no spelling of a training answer is tested on. Logistic regression with an
L2 penalty, positives weighted up to balance, fitted by L-BFGS: convex, so the result does not depend on luck. A harmful
answer's label belongs to its worst window only, which is found by a second round (the multiple-instance trick of
Andrews et al. 2002): first every window of it counts as harmful, then just the one that scored worst.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from scipy.stats import beta

from rlhf_trainer.safety.scorer import LinearFilter, buckets_of, normalise, windows


class DataError(ValueError):
    """The labelled data cannot train a filter; the message says what is missing."""


class Example(NamedTuple):
    response: str
    violation: bool


@dataclass(frozen=True)
class Recipe:
    """How to train. `penalty`: L2 coefficient per weight against the mean loss; n-grams and windows in characters."""

    ngrams: tuple[int, int] = (2, 6)
    buckets: int = 1 << 16
    window: int = 160
    stride: int = 80
    penalty: float = 1e-4
    max_false_positive_rate: float = 0.005
    seed: int = 0


@dataclass(frozen=True)
class Rate:
    """A share with its exact (Clopper-Pearson) 95 % interval."""

    hits: int
    n: int
    estimate: float | None
    lower: float
    upper: float


@dataclass(frozen=True)
class Measured:
    """Errors on one set of answers."""

    false_positives: Rate  # of harmless answers
    false_negatives: Rate  # of harmful answers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rate(hits: int, n: int) -> Rate:
    """Exact two-sided 95 % interval of a binomial share; [0, 1] when there is nothing to count."""
    lower = float(beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    upper = float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return Rate(hits, n, hits / n if n else None, lower, upper)


def measure(model: LinearFilter, examples: Sequence[Example]) -> Measured:
    """Count a filter's errors."""
    wrong = [(example.violation, model.violates(example.response)) for example in examples]
    harmless = [found for truth, found in wrong if not truth]
    harmful = [found for truth, found in wrong if truth]
    return Measured(rate(sum(harmless), len(harmless)), rate(len(harmful) - sum(harmful), len(harmful)))


def train(examples: Sequence[Example], recipe: Recipe, lineage: dict[str, Any]) -> LinearFilter:
    """A filter with its held-out errors in `measured["test"]`. Raises DataError when a part lacks either label."""
    parts = split(examples, recipe.seed)
    for name, part in parts.items():
        for truth in (True, False):
            if not any(example.violation is truth for example in part):
                kind = "harmful" if truth else "harmless"
                raise DataError(
                    f"the {name} part of {len(examples)} rows has no {kind} answer: label more answers (a few hundred "
                    "of each kind make a usable filter)"
                )
    model = _fit(parts["training"], recipe)
    model = replace(model, threshold=_threshold(model, parts["threshold"], recipe.max_false_positive_rate))
    measured = {
        "test": measure(model, parts["test"]).to_dict(),
        "threshold": measure(model, parts["threshold"]).to_dict(),
        "rows": {name: len(part) for name, part in parts.items()},
    }
    return replace(model, measured=measured, lineage=lineage | {"recipe": asdict(recipe)})


def split(examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    """Training, threshold and test parts; equal answers (after normalisation) always go together."""
    parts: dict[str, list[Example]] = {"training": [], "threshold": [], "test": []}
    for example in examples:
        digest = hashlib.sha256(f"{seed}:{normalise(example.response)}".encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:4], "big") % 10
        parts["training" if place < 6 else "threshold" if place < 8 else "test"].append(example)
    return parts


def _fit(examples: Sequence[Example], recipe: Recipe) -> LinearFilter:
    bags = [windows(normalise(example.response), recipe.window, recipe.stride) for example in examples]
    chosen = bags
    weights: NDArray[np.float64] = np.zeros(recipe.buckets + 1)
    for _ in range(2):
        pieces = [piece for bag in chosen for piece in bag]
        labels = np.array([e.violation for e, bag in zip(examples, chosen, strict=True) for _ in bag], dtype=float)
        weights = _regress(_matrix(pieces, recipe), labels, recipe.penalty)
        if all(len(bag) == 1 for bag in bags):
            break
        model = _filter(weights, recipe)
        chosen = [
            (max(bag, key=model.score_window),) if example.violation else bag
            for example, bag in zip(examples, bags, strict=True)
        ]
    return _filter(weights, recipe)


def _filter(weights: NDArray[np.float64], recipe: Recipe) -> LinearFilter:
    return LinearFilter(
        weights[:-1].astype(np.float32), float(weights[-1]), 0.0, recipe.ngrams, recipe.window, recipe.stride
    )


def _matrix(pieces: Sequence[str], recipe: Recipe) -> csr_matrix:
    """One row per window, one column per bucket and a last one of ones (the bias)."""
    hits = [np.append(buckets_of(piece, recipe.ngrams, recipe.buckets), recipe.buckets) for piece in pieces]
    starts = np.concatenate(([0], np.cumsum([len(row) for row in hits])))
    columns = np.concatenate(hits)
    return csr_matrix((np.ones(len(columns)), columns, starts), shape=(len(pieces), recipe.buckets + 1))


def _regress(matrix: csr_matrix, labels: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Weights (buckets + 1,) of the penalised, class-balanced logistic loss; the bias is not penalised."""
    share = labels.mean()
    sample = np.where(labels > 0, 0.5 / share, 0.5 / (1 - share)) / len(labels)
    signs = 2 * labels - 1

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = signs * (matrix @ weights)
        value = float((sample * np.logaddexp(0, -margins)).sum() + penalty / 2 * (weights[:-1] ** 2).sum())
        gradient = matrix.T @ (-sample * signs * expit(-margins))
        gradient[:-1] += penalty * weights[:-1]
        return value, gradient

    found = minimize(loss, np.zeros(matrix.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    solution: NDArray[np.float64] = found.x
    return solution


def _threshold(model: LinearFilter, examples: Sequence[Example], max_false_positive_rate: float) -> float:
    """The lowest threshold whose false positives stay within the allowed share, in the middle of the gap above them."""
    harmless = sorted((model.score(e.response) for e in examples if not e.violation), reverse=True)
    allowed = int(max_false_positive_rate * len(harmless))
    highest_refused = harmless[allowed]
    above = [s for s in (model.score(e.response) for e in examples) if s > highest_refused]
    return (highest_refused + min(above)) / 2 if above else highest_refused + 1.0
