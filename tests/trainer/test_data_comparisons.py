"""Which model people prefer, from annotations that name the models: valid at every look, one label per prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.__main__ import main as trainer
from rlhf_trainer.collect.__main__ import main as collect
from rlhf_trainer.data.comparisons import METRIC, model_verdicts
from rlhf_trainer.desk.__main__ import main as desk
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.digests import folder_digest
from rlhf_trainer.evals.sequential import anytime_interval, e_value, needed_to_exceed
from rlhf_trainer.evals.stats import wilson
from rlhf_trainer.wire import VerdictState
from tests.trainer.data_world import ROW, annotations_of
from tests.trainer.training_world import TinyWorld, write_rows


def compared(result: float, number: int, *, old_first: bool = False, **changes: Any) -> dict[str, Any]:
    """A label of new against old: 1 new wins, 0 old, ½ neither."""
    choice = {1.0: "a", 0.5: "tie", 0.0: "b"}[result]
    models = {"model_a": "new", "model_b": "old"}
    if old_first:
        choice = {"a": "b", "b": "a"}.get(choice, choice)
        models = {"model_a": "old", "model_b": "new"}
    return {**ROW, "prompt": f"question {number}", "preference": choice, **models, **changes}


def test_a_better_model_is_named_with_its_interval_whichever_side_it_stood_on() -> None:
    rng = random.Random(1)
    rows = [compared(float(rng.random() < 0.75), at, old_first=at % 2 == 0, shown_first="a") for at in range(120)]
    (verdict,) = model_verdicts(annotations_of(rows))
    assert (verdict.metric, verdict.state, verdict.n) == (f"{METRIC}/new", VerdictState.PASS, 120)
    results = [float((row["preference"] == "a") == (row["model_a"] == "new")) for row in rows]
    expected = anytime_interval(results)
    assert (verdict.estimate, verdict.lower, verdict.upper) == (expected.estimate, expected.lower, expected.upper)
    assert "new against old: " in verdict.message
    assert "at any time, shown first 60 times of 120" in verdict.message
    mirrored = [row | {"model_a": row["model_b"], "model_b": row["model_a"]} for row in rows]
    assert model_verdicts(annotations_of(mirrored))[0].metric == f"{METRIC}/old"


def test_looking_after_every_twenty_labels_finds_no_winner_between_equals() -> None:
    """120 panels that are asked until someone is ahead; a fixed interval is fooled (negative control)."""
    fooled, naive = 0, 0
    for seed in range(120):
        rng = random.Random(seed)
        rows = [compared(rng.choice((0.0, 0.5, 1.0, 0.0, 1.0)), at) for at in range(300)]
        read = annotations_of(rows)
        looks = [model_verdicts(read[:n])[0] for n in range(20, 301, 20)]
        fooled += any(look.state is VerdictState.PASS for look in looks)
        naive += any(wilson(look.estimate * look.n, look.n).lower > 0.5 for look in looks if look.estimate is not None)
    assert fooled <= 0.05 * 120
    assert naive > 0.10 * 120


def test_an_undecided_comparison_says_how_many_more_prompts_would_decide() -> None:
    rows = [compared(float(at % 5 < 3), at) for at in range(40)]
    (verdict,) = model_verdicts(annotations_of(rows))
    assert verdict.state is VerdictState.NEED_MORE_DATA
    assert verdict.needed is not None
    results = [1.0] * 24 + [0.0] * 16
    assert needed_to_exceed(results, 0.5, 0.025) == verdict.needed
    n = 40 + verdict.needed
    assert e_value([0.6] * n, 0.5) >= 40 > e_value([0.6] * (n - 1), 0.5), "1 / (alpha / 2) is reached just there"
    assert needed_to_exceed([0.5] * 10, 0.5, 0.025) is None
    assert needed_to_exceed([0.500001] * 10, 0.5, 0.025) is None, "more labels than anyone waits for"


def test_a_prompt_counts_once_by_its_first_label() -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    rows = [compared(1.0, 0, created_at=late) for _ in range(50)] + [compared(0.0, 0, created_at=early)]
    (verdict,) = model_verdicts(annotations_of(rows))
    assert (verdict.n, verdict.metric) == (1, f"{METRIC}/old")


def test_what_compares_no_two_models_or_was_not_asked_of_people_is_left_out() -> None:
    rows = [
        ROW,
        compared(1.0, 1, rater_type="model"),
        compared(1.0, 2, model_b="new"),
        {key: value for key, value in compared(1.0, 3).items() if key != "model_b"},
    ]
    assert model_verdicts(annotations_of(rows)) == ()
    bad = compared(1.0, 4) | {"preference": "both_bad"}
    assert model_verdicts(annotations_of([bad]))[0].estimate == 0.5


def test_two_policies_are_compared_from_their_replies_to_the_report(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tiny_world.base, tmp_path / "new"
    changed = AutoModelForCausalLM.from_pretrained(old)
    changed.lm_head.weight.data.mul_(0.5)  # another policy
    changed.save_pretrained(new)
    AutoTokenizer.from_pretrained(old).save_pretrained(new)
    prompts = write_rows(tmp_path / "desk.jsonl", [{"prompt": prompt.text} for prompt in every_prompt()[:60]])
    pairs, labels = tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl"
    asked = ["--policy", str(new), "--against", str(old), "--prompts", str(prompts), "--pairs", "40"]
    assert collect([*asked, "--out", str(pairs)]) == 0
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 40
    firsts = [row["model_a"] for row in rows]
    assert {len(firsts), firsts.count(folder_digest(new)) + firsts.count(folder_digest(old))} == {40}
    assert 10 <= firsts.count(folder_digest(new)) <= 30, "sides are drawn by lot"
    assert {row["sample_reason"] for row in rows} == {"uniform"}
    assert desk(["annotate", "--pairs", str(pairs), "--out", str(labels)]) == 0
    assert trainer(["data", "report", str(labels)]) == 0
    printed = capsys.readouterr().out
    assert "over 40 prompts" in printed
    assert folder_digest(new)[:19] in printed
    with pytest.raises(SystemExit):  # one or the other
        collect([*asked, "--reward-model", str(old), "--out", str(pairs)])
