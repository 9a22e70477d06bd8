"""Two seeds of the service desk before the gate of the reward model; ``benchmarks.gate_seeds`` plays twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gate_seeds import Sizes, holds, play

SIZES = Sizes(pairs=2000, other_pairs=800, scores=300, prompts=10, bases=1, base_steps=(220, 110), epochs=3)
LABELS = ("careful", "careless", "small")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate-seeds")


@pytest.mark.parametrize("seed", [0, 1])
def test_careful_labels_pass_and_bad_ones_are_refused_by_name(cache: Path, seed: int) -> None:
    models = play(cache, seed, SIZES, LABELS)
    by_label = {one.labels: one for one in models}
    assert holds(models), {labels: one.reasons for labels, one in by_label.items()}
    assert "humanCorrelation Fail" in by_label["careless"].reasons
    states = {verdict["metric"]: verdict["state"] for verdict in by_label["careless"].verdicts}
    assert states["accuracy"] != "Fail", "their own labels find nothing wrong"
    assert by_label["small"].reasons, "too few pairs are named as such"
    assert play(cache, seed, SIZES, LABELS) == models, "a finished seed is read, not played again"
