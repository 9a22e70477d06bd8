"""Who is right when raters disagree: one-coin Dawid-Skene by expectation maximisation, gold items clamped.

The model (Dawid and Skene 1979, in the one-coin form of Raykar et al. 2010): a pair's truth is a fair coin, and rater r
reports it with probability s_r, their skill. A Beta prior keeps the skill of a rater with three labels away from 0 and
1, and above one half, which also tells the solution from its mirror image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_trainer.data.agreement import Label, first_answers

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

PRIOR = (4.0, 2.0)  # Beta: mode 0.75, worth four labels
_TIE = 0.5
_ROUNDS = 500
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Aggregate:
    """``probability`` that the first is better by unit, ``skill`` by rater, and how the fit went."""

    probability: Mapping[Hashable, float]
    skill: Mapping[Hashable, float]
    rounds: int
    converged: bool


def dawid_skene(
    labels: Sequence[Label], gold: Mapping[Any, float] | None = None, prior: tuple[float, float] = PRIOR
) -> Aggregate:
    """Aggregates labels (1, 0, or 0.5 for a tie) given the known truth of some units.

    A tie takes no side: it tells nothing about skill, and pulls the pair's probability to one half by its share of the
    pair's labels. A unit with ties alone gets 0.5. Labels of gold units count for skill, their probability is the gold.
    Of a rater who was asked about a unit again the first answer counts: raters are independent, answers of one are not.
    """
    labels = first_answers(labels)
    units = list(dict.fromkeys(label.unit for label in labels))
    raters = list(dict.fromkeys(label.rater for label in labels))
    decided = [label for label in labels if label.value != _TIE]
    unit_at = {unit: index for index, unit in enumerate(units)}
    rater_at = {rater: index for index, rater in enumerate(raters)}
    of_unit = np.array([unit_at[label.unit] for label in decided], dtype=np.intp)
    of_rater = np.array([rater_at[label.rater] for label in decided], dtype=np.intp)
    said = np.array([label.value for label in decided], dtype=np.float64)
    known = {unit_at[unit]: value for unit, value in (gold or {}).items() if unit in unit_at}
    clamp_at, clamp_to = np.array(list(known), dtype=np.intp), np.array(list(known.values()), dtype=np.float64)

    truth = _shares(said, of_unit, len(units))
    truth[clamp_at] = clamp_to
    skill = np.full(len(raters), np.nan)
    for rounds in range(1, _ROUNDS + 1):
        updated = _skills(truth, said, of_unit, of_rater, len(raters), prior)
        change = np.abs(updated - skill).max(initial=0.0) if rounds > 1 else np.inf
        skill = updated
        truth = _truths(skill, said, of_unit, of_rater, len(units))
        truth[clamp_at] = clamp_to
        if change < _TOLERANCE:
            break
    ties = _tie_shares(labels, unit_at)
    ties[clamp_at] = 0.0
    probability = (1 - ties) * truth + ties * _TIE
    return Aggregate(
        dict(zip(units, probability.tolist(), strict=True)),
        dict(zip(raters, skill.tolist(), strict=True)),
        rounds,
        bool(change < _TOLERANCE),
    )


def majority(labels: Sequence[Label]) -> dict[Hashable, float]:
    """Mean label of each unit, one for each rater: the vote that Dawid-Skene is compared with."""
    totals: dict[Hashable, tuple[float, int]] = {}
    for label in first_answers(labels):
        total, count = totals.get(label.unit, (0.0, 0))
        totals[label.unit] = (total + label.value, count + 1)
    return {unit: total / count for unit, (total, count) in totals.items()}


def _shares(said: Floats, of_unit: Indices, units: int) -> Floats:
    count = np.bincount(of_unit, minlength=units)
    votes = np.bincount(of_unit, weights=said, minlength=units)
    return np.where(count > 0, votes / np.maximum(count, 1), _TIE)


def _skills(
    truth: Floats, said: Floats, of_unit: Indices, of_rater: Indices, raters: int, prior: tuple[float, float]
) -> Floats:
    """M step, the mode under the prior: expected right answers over answers, prior counts added."""
    right = said * truth[of_unit] + (1 - said) * (1 - truth[of_unit])
    hits = np.bincount(of_rater, weights=right, minlength=raters) + prior[0] - 1
    answers = np.bincount(of_rater, minlength=raters) + sum(prior) - 2
    return np.asarray(hits / answers, dtype=np.float64)


def _truths(skill: Floats, said: Floats, of_unit: Indices, of_rater: Indices, units: int) -> Floats:
    """E step: the log odds that the first is better are the raters' log odds of being right, signed by their label."""
    odds = np.log(skill) - np.log1p(-skill)
    total = np.bincount(of_unit, weights=(2 * said - 1) * odds[of_rater], minlength=units)
    return np.asarray(0.5 * (1 + np.tanh(total / 2)), dtype=np.float64)


def _tie_shares(labels: Sequence[Label], unit_at: Mapping[Hashable, int]) -> Floats:
    at = np.array([unit_at[label.unit] for label in labels], dtype=np.intp)
    ties = np.array([label.value == _TIE for label in labels], dtype=np.float64)
    return np.asarray(
        np.bincount(at, weights=ties, minlength=len(unit_at)) / np.bincount(at, minlength=len(unit_at)),
        dtype=np.float64,
    )
