"""Rater reports: exact tests against scipy and statsmodels, planted faults found, nobody else accused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from rlhf_trainer.data.raters import (
    benjamini_hochberg,
    binomial_half,
    contradictions,
    gini,
    rater_reports,
    self_consistency,
)
from tests.trainer.data_world import ROW, annotations_of, rows_by


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (3, 10), (5, 10), (60, 100), (41, 100), (500, 1000), (7, 7)])
def test_the_binomial_test_is_scipys(hits: int, n: int) -> None:
    assert binomial_half(hits, n) == pytest.approx(binomtest(hits, n).pvalue, rel=1e-9)


def test_q_values_are_statsmodels() -> None:
    rng = random.Random(0)
    p = [rng.random() ** 3 for _ in range(30)] + [0.5, 0.5]
    assert benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert benjamini_hochberg([]) == []


def left_always(rows: list[dict[str, Any]], rater: str, share: float, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        row | {"preference": row["shown_first"]} if row["rater_id"] == rater and rng.random() < share else row
        for row in rows
    ]


def test_the_rater_who_takes_the_first_is_found_and_nobody_else() -> None:
    skills = {f"r{index:02d}": 0.8 for index in range(12)}
    rows = left_always(rows_by(skills, pairs=1200, labels=2, seed=1), "r11", share=0.9, seed=2)
    reports = rater_reports(annotations_of(rows), {"r11": 0.5})
    assert [report.rater for report in reports if report.position_biased] == ["r11"]
    found = next(report for report in reports if report.rater == "r11")
    assert found.first is not None
    assert found.first.estimate == pytest.approx(0.95, abs=0.04)
    assert found.skill == 0.5


def test_a_small_bias_is_no_fault_however_sure() -> None:
    """P(first) = 0.55 on 20,000 labels: significant beyond doubt, and too small to matter."""
    row = ROW | {"rater_id": "r", "shown_first": "a"}
    rows = [row | {"preference": "a" if index % 20 < 11 else "b"} for index in range(20_000)]
    (report,) = rater_reports(annotations_of(rows), {})
    assert report.first_q is not None
    assert report.first_q < 1e-6
    assert not report.position_biased


def test_few_labels_accuse_nobody() -> None:
    rows = [ROW | {"rater_id": "r", "shown_first": "a", "prompt": f"p{index}"} for index in range(6)]
    (report,) = rater_reports(annotations_of(rows), {})
    assert report.first is not None
    assert report.first.estimate == 1.0
    assert not report.position_biased


def test_position_counts_in_the_order_shown_and_not_in_the_letters() -> None:
    rows = [
        ROW | {"rater_id": "r", "prompt": f"p{at}", "shown_first": "ab"[at % 2], "preference": "ab"[at % 2]}
        for at in range(50)
    ]
    (report,) = rater_reports(annotations_of(rows), {})
    assert report.first is not None
    assert report.first.estimate == 1.0


def test_gold_accuracy_has_wilsons_interval() -> None:
    rows = rows_by({"r": 0.75, "s": 0.75}, pairs=80, labels=2, gold=1.0, seed=3)
    report = next(each for each in rater_reports(annotations_of(rows), {}) if each.rater == "r")
    right = sum(row["preference"] == row["truth"] for row in rows if row["rater_id"] == "r")
    assert report.gold is not None
    assert (report.gold.n, report.gold.estimate) == (80, right / 80)
    assert (report.gold.lower, report.gold.upper) == pytest.approx(proportion_confint(right, 80, method="wilson"))


def test_pace_ties_repeats_and_shares() -> None:
    base = ROW | {"rater_id": "r"}
    rows = [
        base | {"duration_s": 2.0, "preference": "a"},
        base | {"duration_s": 4.0, "response_a": ROW["response_b"], "response_b": ROW["response_a"], "preference": "b"},
        base | {"duration_s": 9.0, "preference": "b"},
        base | {"preference": "tie", "prompt": "other"},
        ROW | {"rater_id": "s"},
        ROW,  # nobody's row is in nobody's report
    ]
    first, second = rater_reports(annotations_of(rows), {})
    assert (first.rater, first.annotations, first.share) == ("r", 4, 0.8)
    assert (first.seconds, first.tie_rate) == (4.0, 0.25)
    assert (first.repeats, first.consistency) == (3, 1 / 3)  # the swapped row says the same as the first
    assert (second.seconds, second.gold, second.consistency, second.first) == (None, None, None, None)


def test_contradictions_are_counted_by_pair() -> None:
    base = ROW | {"rater_id": "r"}
    rows = annotations_of([base, base | {"preference": "b"}, base | {"prompt": "q"}, base | {"prompt": "q"}])
    assert contradictions(rows) == (2, 1)
    assert self_consistency(rows) == (2, 1)


def test_gini_of_equal_and_of_one() -> None:
    assert gini([5, 5, 5, 5]) == 0.0
    assert gini([0, 0, 0, 8]) == 0.75
    assert gini([1, 3]) == 0.25
    assert gini([]) == 0.0
