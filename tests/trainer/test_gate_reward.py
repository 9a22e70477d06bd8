"""Whole reward-model attempts: every field of the configuration does something, and the recipe is held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf_trainer.config import HumanScores, RewardModelValidation
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.recipe import Recipe
from rlhf_trainer.desk.model import build_tokenizer
from rlhf_trainer.desk.vocabulary import VALENCE
from rlhf_trainer.exits import Invalid
from rlhf_trainer.models.reward import check_reward_model, load_reward_model, normaliser
from rlhf_trainer.wire import FailureClass, Located, Result, VerdictState
from tests.trainer.attempts import run_here
from tests.trainer.training_world import TinyWorld, preference_rows, training_of, true_reward, write_rows

ASPECTS = {"feeling": 1.0, "grumpiness": -1.0}  # sign of the true reward's difference that each follows


def rows_with_aspects() -> list[dict[str, Any]]:
    """``preference_rows`` with strengths, cohorts, and two aspects of which the second is the first upside down;
    every third row orders no aspect."""
    rows = preference_rows(600, seed=21)
    for index, row in enumerate(rows):
        ahead = true_reward(row["response_a"]) > true_reward(row["response_b"])
        row |= {"strength": index % 4, "cohort": f"cohort{index % 2}"}
        if index % 3:
            row["aspects"] = {name: "a" if ahead is (sign > 0) else "b" for name, sign in ASPECTS.items()}
    return rows


@pytest.fixture(scope="module")
def attempts(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("reward-attempts")
    path = write_rows(folder / "preferences.jsonl", rows_with_aspects())
    scores = HumanScores(uri="pvc://c/p", digest="sha256:" + "0" * 64, min_correlation=-1.0)
    everything = RewardModelValidation(
        min_accuracy=0.0,
        max_calibration_error=1.0,
        max_length_bias=1.0,
        max_cohort_gap=1.0,
        min_probe_pass_rate=0.0,
        human_scores=scores,
    )
    plain = {"epochs": 2, "learning_rate": 0.02, "ensemble": {"members": 1}, "deepspeed": {"zero_stage": 0}}
    runs = {
        "aspects": training_of(**plain, aspects=list(ASPECTS), margin=0.5),
        "micro": training_of(**plain, aspects=list(ASPECTS), margin=0.5, micro_batch_size=4),
        "plain": training_of(**plain),
        "margin": training_of(**plain, margin=0.5),
    }
    return {
        name: run_here(
            tiny_world.config(
                folder / name,
                training=training,
                preferences=Located(path=str(path)),
                human_scores=Located(path=str(tiny_world.scores)),
                validation=everything,
            )
        )
        for name, training in runs.items()
    }


def members(result: Result) -> list[dict[str, torch.Tensor]]:
    assert result.artifact is not None, result.message
    return [load_file(path) for path in sorted(Path(result.artifact.path).glob("members/*/model.safetensors"))]


def test_each_aspect_gets_a_head_that_follows_its_labels(attempts: dict[str, Result]) -> None:
    result = attempts["aspects"]
    assert result.failure_class is FailureClass.SUCCESS, result.message
    verdicts = {verdict.metric: verdict for verdict in result.verdicts}
    for name in ASPECTS:
        found = verdicts[f"aspectAccuracy/{name}"]
        assert found.state is VerdictState.PASS
        assert found.estimate is not None
        assert found.estimate > 0.75
    assert result.artifact is not None
    folder = Path(result.artifact.path) / "members" / "0"
    assert AutoConfig.from_pretrained(folder).id2label == {0: "reward", 1: "feeling", 2: "grumpiness"}
    # The second aspect is the first upside down, so its head must point the other way on unseen text.
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    best, worst = max(VALENCE, key=VALENCE.__getitem__), min(VALENCE, key=VALENCE.__getitem__)
    with torch.no_grad():
        good, bad = (model(torch.tensor([encoder.pair("hello refund", text)])).logits[0] for text in (best, worst))
    assert float(good[1] - bad[1]) > 0 > float(good[2] - bad[2])


def test_the_scorer_returns_the_overall_head(attempts: dict[str, Result]) -> None:
    result = attempts["aspects"]
    assert result.artifact is not None
    scorer = load_reward_model(result.artifact.path)
    mean, _ = scorer(["hello refund"], ["happy"])
    encoder, raw = scorer.encoder, []
    for member in scorer.ensemble.members:
        ids = torch.tensor([encoder.pair("hello refund", "happy")])
        raw.append(member(ids, torch.tensor([ids.shape[1]]))[:, 0])
    expected, _ = scorer.calibration.apply(torch.stack(raw))
    assert float(mean) == pytest.approx(float(expected), abs=1e-5)


def test_micro_batches_change_nothing(attempts: dict[str, Result]) -> None:
    """Aspects are ordered by some rows only, so their share in a pass differs; the update must not."""
    for whole, cut in zip(members(attempts["aspects"]), members(attempts["micro"]), strict=True):
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor, cut[name], atol=2e-4, rtol=0, msg=name)


def test_neither_do_they_change_a_figure(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """A tie has no right side: a pass without a decided pair counts for nothing, one with many for as many."""
    rows = [row | ({"preference": "tie"} if index % 3 else {}) for index, row in enumerate(preference_rows(120, 4))]
    preferences = Located(path=str(write_rows(tmp_path / "ties.jsonl", rows)))
    whole, cut = (
        run_here(
            tiny_world.config(
                tmp_path / str(micro), training=training_of(micro_batch_size=micro), preferences=preferences
            )
        ).metrics
        for micro in (16, 1)
    )
    for name in ("loss", "accuracy", "margin"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-4), name


def test_a_base_with_dropout_in_its_attention_is_trained_without(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """It is no module of its own there. Its noise would come from generators that no seed of a run names."""
    shutil.copytree(tiny_world.base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.5}))
    base = Located(path=str(tmp_path / "base"))
    runs = [run_here(tiny_world.config(tmp_path / name, base_model=base)) for name in ("once", "again")]
    for once, again in zip(*map(members, runs), strict=True):
        for name, tensor in once.items():
            torch.testing.assert_close(tensor, again[name], atol=0, rtol=0, msg=name)


def test_the_gate_asks_nothing_that_the_model_cannot_read(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With positions that are learned, and no more of them than maxLength, a spoilt reply or one with a trusted score
    has no place for its end: an index error when everything was trained, in every attempt anew."""
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_world.base))
    special = {"pad_token_id": encoder.pad_id, "eos_token_id": encoder.eos_id, "bos_token_id": encoder.eos_id}
    shapes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(vocab_size=len(encoder.tokenizer), **shapes, **special)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    encoder.tokenizer.save_pretrained(tmp_path / "base")
    rows = [json.loads(line) for line in tiny_world.scores.read_text().splitlines()]
    rows[7]["response"] = " ".join(["glad"] * 30)
    result = run_here(
        tiny_world.config(
            tmp_path / "out",
            training=training_of(max_length=16),
            base_model=Located(path=str(tmp_path / "base")),
            human_scores=Located(path=str(write_rows(tmp_path / "scores.jsonl", rows))),
        )
    )
    assert result.failure_class is FailureClass.SUCCESS, result.message
    assert "scores.jsonl: 1 of 40 rows have more than 16 tokens" in caplog.text


def test_aspects_and_margins_change_the_weights(attempts: dict[str, Result]) -> None:
    """Negative control of the comparison above, and the fields are read."""
    plain = members(attempts["plain"])[0]
    for other in ("aspects", "margin"):
        moved = members(attempts[other])[0]
        shared = {name for name in plain if plain[name].shape == moved[name].shape}
        assert max(float((plain[name] - moved[name]).abs().max()) for name in shared) > 0.01, other


def test_a_margin_widens_the_differences(attempts: dict[str, Result]) -> None:
    """Before calibration takes it out again, as the temperature shows."""
    assert attempts["margin"].metrics["temperature"] > attempts["plain"].metrics["temperature"]


def test_every_asked_verdict_and_figure_is_there(attempts: dict[str, Result]) -> None:
    result = attempts["plain"]
    names = [verdict.metric for verdict in result.verdicts]
    assert names == [
        "accuracy", "calibrationError", "humanCorrelation", "humanPearson", "lengthBias", "cohortGap", "probePassRate",
    ]  # fmt: skip
    assert set(result.metrics) >= {
        "brierScore", "humanPearson", "lengthBias", "cohortGap", "keywordStuffingPassRate", "truncationPassRate",
        "wrongTopicPassRate", "emptyPassRate", "rewardScale", "temperature",
    }  # fmt: skip
    assert all(verdict.n > 0 and verdict.lower is not None for verdict in result.verdicts)


def test_the_reference_set_is_the_zero_and_the_unit() -> None:
    raw = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * 4 + torch.tensor([[5.0], [-1.0], [0.0]])
    calibration = normaliser(raw, 2.0)
    mean, _ = calibration.apply(raw)
    standard = calibration.standardise(mean)
    assert float(standard.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(standard.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert float(calibration.apply(raw + 1.0)[0].mean()) == pytest.approx(0.5, abs=1e-5), (
        "frozen: later text moves it not"
    )


def test_the_normaliser_is_stored(attempts: dict[str, Result]) -> None:
    result = attempts["plain"]
    assert result.artifact is not None
    document = json.loads((Path(result.artifact.path) / "calibration.json").read_text())
    assert document["scale"] == pytest.approx(result.metrics["rewardScale"])
    assert document["formatting"]["layout"] == "prompt+response+eos/v1"
    assert (document["formatting"]["bos"], document["formatting"]["eos"]) == ("<bos>", "<eos>")


def test_another_tokenizer_is_refused(attempts: dict[str, Result], tmp_path: Path) -> None:
    result = attempts["plain"]
    assert result.artifact is not None
    same = Encoder(build_tokenizer())
    assert load_reward_model(result.artifact.path, encoder=same).encoder.eos_id == same.eos_id
    check_reward_model(result.artifact.path, same)
    other = build_tokenizer()
    other.add_tokens(["blockchain"])
    with pytest.raises(Invalid, match=r"tokenizer .* is not .*; train the reward model from the same base"):
        check_reward_model(result.artifact.path, Encoder(other))
    swapped = build_tokenizer()
    swapped.eos_token = "<unk>"
    with pytest.raises(Invalid, match="eos '<eos>' is not '<unk>'"):
        load_reward_model(result.artifact.path, encoder=Encoder(swapped))
    altered = tmp_path / "altered"
    shutil.copytree(result.artifact.path, altered)
    for folder in altered.glob("members/*"):
        other.save_pretrained(folder)
    with pytest.raises(Invalid, match="the tokenizer in its own folder"):
        load_reward_model(altered)


def test_a_recipe_survives_saving(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "a b"], padding=True, truncation=True, max_length=1)  # settings of one call are no other tokenizer
    assert Recipe.of(Encoder(again)) == Recipe.of(Encoder(tokenizer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 5}, "microBatchSize is 5"),
        ({"aspects": ["feeling", "feeling"]}, "names an aspect twice"),
        ({"aspects": ["wit"]}, "no training pair is ordered by the aspect 'wit'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny_world: TinyWorld, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    result = run_here(tiny_world.config(tmp_path, training=training_of(**changes)))
    assert result.failure_class is FailureClass.INVALID
    assert message in result.message
