"""Dawid-Skene finds planted skills and truths, stands at a maximum, and gold items rescue it from a bad majority."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping

import pytest

from rlhf_trainer.data.agreement import Label
from rlhf_trainer.data.dawid_skene import PRIOR, dawid_skene, majority


def simulated(
    skills: Mapping[str, float], units: int, per_unit: int, seed: int, ties: float = 0.0
) -> tuple[list[Label], dict[int, float]]:
    rng = random.Random(seed)
    truth = {unit: float(rng.random() < 0.5) for unit in range(units)}
    labels = []
    for unit in range(units):
        for rater in rng.sample(sorted(skills), per_unit):
            said = truth[unit] if rng.random() < skills[rater] else 1 - truth[unit]
            labels.append(Label(unit, rater, 0.5 if rng.random() < ties else said, unit))
    return labels, truth


def accuracy(probability: Mapping[int, float], truth: Mapping[int, float]) -> float:
    """Share right; an undecided unit is a coin toss."""
    return sum(0.5 if probability[u] == 0.5 else (probability[u] > 0.5) == t for u, t in truth.items()) / len(truth)


PANEL = {f"good-{i}": 0.88 for i in range(6)} | {f"careless-{i}": 0.55 for i in range(5)} | {"coin": 0.5}


def test_planted_skills_are_recovered_and_beat_the_vote() -> None:
    labels, truth = simulated(PANEL, units=2000, per_unit=3, seed=0)
    found = dawid_skene(labels)
    assert found.converged
    for rater, skill in PANEL.items():
        assert found.skill[rater] == pytest.approx(skill, abs=0.08)  # 500 labels each
    assert accuracy(found.probability, truth) > accuracy(majority(labels), truth) + 0.05  # type: ignore[arg-type]


def test_probabilities_mean_what_they_say() -> None:
    """Of units called with about 0.8 about 80% are right, and the Brier score beats the vote's."""
    labels, truth = simulated(PANEL, units=3000, per_unit=3, seed=1)
    found = dawid_skene(labels)
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for unit, p in found.probability.items():
        groups[min(4, int(p * 5))].append((p, truth[unit]))  # type: ignore[index]
    for group in groups.values():
        if len(group) > 100:
            predicted, observed = (sum(values) / len(group) for values in zip(*group, strict=True))
            assert predicted == pytest.approx(observed, abs=0.06)

    def brier(probability: Mapping[object, float]) -> float:
        return sum((p - truth[unit]) ** 2 for unit, p in probability.items())  # type: ignore[index]

    assert brier(found.probability) < 0.9 * brier(majority(labels))


def test_the_fit_is_a_maximum_of_the_posterior() -> None:
    """Finite differences of the log posterior of the skills are zero where the fit stopped, and not elsewhere."""
    labels, _ = simulated({"a": 0.9, "b": 0.7, "c": 0.6, "d": 0.8}, units=120, per_unit=3, seed=2)

    def log_posterior(skill: Mapping[str, float]) -> float:
        by_unit: dict[object, list[Label]] = defaultdict(list)
        for label in labels:
            by_unit[label.unit].append(label)
        total = sum((PRIOR[0] - 1) * math.log(s) + (PRIOR[1] - 1) * math.log1p(-s) for s in skill.values())
        for own in by_unit.values():
            sides = [
                math.prod(
                    skill[str(label.rater)] if label.value == side else 1 - skill[str(label.rater)] for label in own
                )
                for side in (0.0, 1.0)
            ]
            total += math.log(0.5 * sum(sides))
        return total

    skill = {str(rater): value for rater, value in dawid_skene(labels).skill.items()}

    def gradient(at: Mapping[str, float], rater: str) -> float:
        step = 1e-5
        return (log_posterior({**at, rater: at[rater] + step}) - log_posterior({**at, rater: at[rater] - step})) / (
            2 * step
        )

    assert max(abs(gradient(skill, rater)) for rater in skill) < 1e-2
    moved = {rater: value - 0.05 for rater, value in skill.items()}
    assert max(abs(gradient(moved, rater)) for rater in skill) > 5


def test_gold_items_rescue_the_truth_from_a_bad_majority() -> None:
    """Five of eight raters are worse than a coin. Without gold the fit believes them: the control must fail."""
    skills = {f"bad-{i}": 0.25 for i in range(5)} | {f"good-{i}": 0.9 for i in range(3)}
    labels, truth = simulated(skills, units=800, per_unit=4, seed=3)
    gold = {unit: truth[unit] for unit in range(60)}
    rest = {unit: value for unit, value in truth.items() if unit not in gold}
    rescued = dawid_skene(labels, gold)
    assert accuracy(rescued.probability, rest) > 0.9  # type: ignore[arg-type]
    assert all(rescued.probability[unit] == value for unit, value in gold.items())
    assert all(rescued.skill[f"bad-{i}"] < 0.4 for i in range(5))
    assert accuracy(dawid_skene(labels).probability, rest) < 0.2  # type: ignore[arg-type]


def test_one_unit_follows_from_the_skills_in_closed_form() -> None:
    labels, _ = simulated({"a": 0.9, "b": 0.7, "c": 0.8}, units=200, per_unit=3, seed=4)
    found = dawid_skene(labels)
    own = [label for label in labels if label.unit == 7]
    odds = sum(
        (1 if label.value == 1.0 else -1) * math.log(found.skill[label.rater] / (1 - found.skill[label.rater]))
        for label in own
    )
    assert found.probability[7] == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)


def test_a_rater_with_one_label_gets_nearly_the_prior() -> None:
    labels, _ = simulated({"a": 0.9, "b": 0.9, "c": 0.9}, units=100, per_unit=3, seed=5)
    found = dawid_skene([*labels, Label(0, "new", labels[0].value, 0)])
    assert 0.75 <= found.skill["new"] < 0.85


def test_one_voice_asked_again_is_no_second_voice() -> None:
    """Raters are shown pairs twice to see whether they are consistent; what they remember is no further evidence."""
    labels, _ = simulated({"a": 0.9, "b": 0.7, "c": 0.8}, units=200, per_unit=3, seed=6)
    repeated = [label for label in labels if label.rater == "b" and label.unit < 100] * 4  # type: ignore[operator]
    assert dawid_skene([*labels, *repeated]) == dawid_skene(labels)
    outvoted = [Label("u", "a", 1.0, 0), Label("u", "c", 1.0, 0), *[Label("u", "b", 0.0, 0)] * 5]
    assert dawid_skene(outvoted).probability["u"] > 0.5
    assert majority(outvoted)["u"] == pytest.approx(2 / 3)


def test_ties_take_no_side() -> None:
    found = dawid_skene(
        [Label("t", "a", 0.5, 0), Label("t", "b", 0.5, 0), Label("h", "a", 1.0, 0), Label("h", "b", 0.5, 0)]
    )
    assert found.probability["t"] == 0.5
    assert 0.5 < found.probability["h"] < 0.75
    only = dawid_skene([Label("h", "a", 1.0, 0)])
    assert only.probability["h"] > found.probability["h"]


def test_turning_every_pair_round_turns_every_answer_round() -> None:
    labels, _ = simulated(PANEL, units=100, per_unit=3, seed=6, ties=0.1)
    turned = [Label(label.unit, label.rater, 1 - label.value, label.cluster) for label in labels]
    one, other = dawid_skene(labels), dawid_skene(turned)
    for unit, p in one.probability.items():
        assert other.probability[unit] == pytest.approx(1 - p, abs=1e-9)


def test_nothing_in_nothing_out() -> None:
    found = dawid_skene([])
    assert (dict(found.probability), dict(found.skill)) == ({}, {})
