"""Pairs for labelling: most where the ensemble disagrees, some by lot with a known chance, all by the policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_trainer.collect.__main__ import main
from rlhf_trainer.collect.candidates import Candidate, disagreement
from rlhf_trainer.collect.choose import Reason, choose
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.rows import load_preferences
from rlhf_trainer.desk.__main__ import main as desk
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, RewardScorer, load_reward_model
from tests.trainer.ppo_world import make_policy_world
from tests.trainer.training_world import TinyWorld, write_rows


def test_the_most_disagreed_about_are_taken_and_a_quarter_is_drawn_by_lot() -> None:
    values = [float(index) for index in range(100)]
    chosen = choose(values, 20, 0.25, seed=1)
    by_reason = {reason: [one for one in chosen if one.reason is reason] for reason in Reason}
    assert [one.index for one in by_reason[Reason.DISAGREEMENT]] == list(range(85, 100))
    assert len(by_reason[Reason.UNIFORM]) == 5
    assert {one.probability for one in by_reason[Reason.UNIFORM]} == {5 / 85}
    assert choose(values, 20, 0.25, seed=1) == chosen != choose(values, 20, 0.25, seed=2)


def test_inverse_probability_weights_undo_the_choice() -> None:
    """A mean over all candidates is estimated without bias from the chosen; the plain mean is far off (control)."""
    rng = np.random.default_rng(3)
    values = rng.gamma(2.0, 1.0, 400)
    weighted, plain = [], []
    for seed in range(400):
        chosen = choose(list(values), 80, 0.25, seed)
        weighted.append(sum(values[one.index] / one.probability for one in chosen) / len(values))
        plain.append(np.mean([values[one.index] for one in chosen]))
    error = np.std(weighted) / len(weighted) ** 0.5
    assert abs(np.mean(weighted) - values.mean()) < 4 * error
    assert abs(np.mean(plain) - values.mean()) > 40 * error


@pytest.mark.parametrize(("count", "share"), [(0, 0.2), (11, 0.2), (5, 1.5)])
def test_what_cannot_be_chosen_is_refused(count: int, share: float) -> None:
    with pytest.raises(ValueError, match=r"candidates|uniform share"):
        choose([1.0] * 10, count, share, seed=0)


def test_members_that_differ_by_a_constant_do_not_disagree_about_pairs(tiny_world: TinyWorld) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_world.base))
    ensemble = RewardEnsemble.from_base(tiny_world.base, 2, encoder.pad_id, seed=1)
    ensemble.members[1].load_state_dict(ensemble.members[0].state_dict())
    pairs = [Candidate("hello refund", "glad to help", "sorry"), Candidate("hello invoice", "no", "happy now")]
    same = RewardScorer(ensemble, encoder, RewardCalibration(1.0, (0.0, 5.0), 0.1))
    assert disagreement(same, pairs) == pytest.approx([0.0, 0.0], abs=1e-6)
    others = RewardEnsemble.from_base(tiny_world.base, 2, encoder.pad_id, seed=1)
    assert min(disagreement(RewardScorer(others, encoder, RewardCalibration(1.0, (0.0, 0.0), 0.1)), pairs)) > 1e-3


def test_collected_pairs_are_labelled_and_read_as_preferences(tiny_world: TinyWorld, tmp_path: Path) -> None:
    world = make_policy_world(tmp_path, tiny_world)
    prompts = write_rows(tmp_path / "desk.jsonl", [{"prompt": prompt.text} for prompt in every_prompt()[:30]])
    arguments = ["--policy", str(world.base), "--reward-model", str(world.reward_model), "--prompts", str(prompts)]
    out, labels = tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl"
    assert main([*arguments, "--pairs", "12", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["pair_id"] for row in rows}) == 12
    assert {row["sample_reason"] for row in rows} == {"disagreement", "uniform"}
    first = out.read_bytes()
    assert main([*arguments, "--pairs", "12", "--out", str(out)]) == 0
    assert out.read_bytes() == first  # a function of weights and seed
    assert desk(["annotate", "--pairs", str(out), "--out", str(labels)]) == 0
    assert len(load_preferences(labels)) == 12


def test_too_few_prompts_are_refused_with_a_remedy(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_policy_world(tmp_path, tiny_world)
    arguments = ["--policy", str(world.base), "--reward-model", str(world.reward_model)]
    code = main([*arguments, "--prompts", str(world.prompts), "--pairs", "5000", "--out", str(tmp_path / "x")])
    assert code == 11
    assert "sample more prompts" in capsys.readouterr().err
    assert load_reward_model(world.reward_model).calibration.temperature == 1.0
