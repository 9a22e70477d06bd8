"""Agreement against published values, scikit-learn, closed forms and the spread that theory asks for."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from rlhf_trainer.data.agreement import (
    Label,
    Metric,
    krippendorff_alpha,
    mean_cohen_kappa,
    noise_ceiling,
    raw_agreement,
)

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C: four observers, missing values.
EXAMPLE = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}


def labels_of(table: dict[str, list[int | None]]) -> list[Label]:
    return [
        Label(unit, rater, float(value), unit)
        for rater, values in table.items()
        for unit, value in enumerate(values)
        if value is not None
    ]


def simulated(units: int, raters: int, skill: float, rng: random.Random, categories: int = 2) -> list[Label]:
    found = []
    for unit in range(units):
        truth = rng.randrange(categories)
        for rater in range(raters):
            wrong = (truth + rng.randrange(1, categories)) % categories
            found.append(Label(unit, rater, float(truth if rng.random() < skill else wrong), unit))
    return found


@pytest.mark.parametrize(
    ("metric", "published"), [(Metric.NOMINAL, 0.743), (Metric.ORDINAL, 0.815), (Metric.INTERVAL, 0.849)]
)
def test_alpha_is_the_published_one_with_missing_values(metric: Metric, published: float) -> None:
    found = krippendorff_alpha(labels_of(EXAMPLE), metric)
    assert found is not None
    assert found.estimate == pytest.approx(published, abs=0.0005)
    assert found.n == 11  # the twelfth unit has one label
    assert found.lower < found.estimate < found.upper


def test_alpha_of_complete_nominal_labels_follows_from_fleiss_kappa() -> None:
    """alpha = 1 - (1 - kappa)(1 - 1/n) for complete data, n labels in all."""
    labels = simulated(60, 4, 0.7, random.Random(1), categories=3)
    table = np.array([label.value for label in labels]).reshape(60, 4).astype(int)
    kappa = fleiss_kappa(aggregate_raters(table)[0])
    found = krippendorff_alpha(labels)
    assert found is not None
    assert found.estimate == pytest.approx(1 - (1 - kappa) * (1 - 1 / len(labels)), abs=1e-12)


def test_kappa_of_two_raters_is_scikit_learns() -> None:
    labels = simulated(80, 2, 0.75, random.Random(2), categories=3)
    first, second = ([label.value for label in labels if label.rater == rater] for rater in (0, 1))
    found = mean_cohen_kappa(labels)
    assert found is not None
    assert found.estimate == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_mean_kappa_weighs_pairs_of_raters_by_their_shared_units() -> None:
    rng = random.Random(3)
    labels = [label for label in simulated(90, 4, 0.8, rng) if rng.random() < 0.6]
    kappas, weights = [], []
    for pair in combinations(range(4), 2):
        own = [{label.unit: label.value for label in labels if label.rater == rater} for rater in pair]
        shared = sorted(set(own[0]) & set(own[1]))
        kappas.append(cohen_kappa_score(*[[values[unit] for unit in shared] for values in own]))
        weights.append(len(shared))
    found = mean_cohen_kappa(labels)
    assert found is not None
    assert found.estimate == pytest.approx(np.average(kappas, weights=weights), abs=1e-12)


def test_agreement_does_not_depend_on_order_or_names() -> None:
    labels = simulated(50, 3, 0.7, random.Random(4))
    shuffled = [Label(label.unit, f"r{label.rater}", label.value, label.cluster) for label in labels]
    random.Random(5).shuffle(shuffled)
    for statistic in (krippendorff_alpha, mean_cohen_kappa):
        one, other = statistic(labels), statistic(shuffled)
        assert one is not None
        assert other is not None
        assert one.estimate == pytest.approx(other.estimate, abs=1e-12)


def test_two_coins_agree_by_chance_alone_and_two_copies_fully() -> None:
    chance = krippendorff_alpha(simulated(2000, 2, 0.5, random.Random(6)))
    assert chance is not None
    assert chance.lower < 0 < chance.upper
    perfect = krippendorff_alpha(simulated(50, 2, 1.0, random.Random(7)))
    assert perfect is not None
    assert perfect.estimate == 1.0


def test_opposite_raters_are_worse_than_chance() -> None:
    labels = [Label(unit, rater, float((unit + rater) % 2), unit) for unit in range(40) for rater in (0, 1)]
    for found in (krippendorff_alpha(labels), mean_cohen_kappa(labels)):
        assert found is not None
        assert found.estimate < -0.9


@pytest.mark.parametrize(
    "labels",
    [
        [],
        [Label(1, "r", 1.0, 1)],
        [Label(1, "r", 1.0, 1), Label(1, "r", 0.0, 1)],  # one rater twice is no agreement
        [Label(1, "r", 1.0, 1), Label(1, "s", 1.0, 1)],  # one value alone
    ],
)
def test_without_anything_to_agree_about_there_is_no_figure(labels: list[Label]) -> None:
    assert krippendorff_alpha(labels) is None
    assert mean_cohen_kappa(labels) is None


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Two raters of skill s agree with kappa (2s - 1)^2; 100 data sets of 150 units."""
    truth, covered = 0.6, 0
    skill = 0.5 + 0.5 * truth**0.5
    widths = []
    for seed in range(100):
        found = krippendorff_alpha(simulated(150, 2, skill, random.Random(1000 + seed)), seed=seed)
        assert found is not None
        covered += found.lower <= truth <= found.upper
        widths.append((found.upper - found.lower) / 2)
    assert covered >= 88
    # The binomial spread of 1 - 2 x disagreement: 1.96 x 2 sqrt(0.2 x 0.8 / 150).
    assert np.mean(widths) == pytest.approx(1.96 * 2 * (0.16 / 150) ** 0.5, rel=0.12)


def test_copies_of_a_prompt_do_not_narrow_the_interval() -> None:
    """Ten units per prompt that all go the same way hold the evidence of one: clustering must see it."""
    labels = simulated(40, 2, 0.8, random.Random(8))
    copied = [Label((label.unit, copy), label.rater, label.value, label.unit) for label in labels for copy in range(10)]
    naive = [Label(label.unit, label.rater, label.value, label.unit) for label in copied]
    one, clustered, fooled = (krippendorff_alpha(each) for each in (labels, copied, naive))
    assert one is not None
    assert clustered is not None
    assert fooled is not None
    assert clustered.upper - clustered.lower == pytest.approx(one.upper - one.lower, rel=0.1)
    assert fooled.upper - fooled.lower < 0.5 * (one.upper - one.lower)


def test_raw_agreement_and_its_ceiling() -> None:
    labels = [Label(1, "r", 1.0, 1), Label(1, "s", 1.0, 1), Label(1, "t", 0.0, 1), Label(2, "r", 1.0, 2)]
    assert raw_agreement(labels) == (3, 1 / 3)
    assert noise_ceiling(0.726) == pytest.approx(0.836, abs=0.001)
    assert noise_ceiling(0.8) == pytest.approx(0.887, abs=0.001)
    assert noise_ceiling(0.3) == 0.5
