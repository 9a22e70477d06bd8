"""vLLM itself behind the trainer's ``Generator`` protocol: one engine asked everything, and whole attempts on one rank
and on two that sample with it, in the process group that DeepSpeed trains in. On CPU, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import special, stats

from rlhf_trainer.wire import AttemptConfig, FailureClass
from tests.trainer.ppo_world import PolicyWorld, history, weights
from tests.trainer.training_world import TinyWorld
from tests.trainer.vllm_world import make_vllm_world, run_in_vllm, vllm_attempt

EXACT = 1e-4  # nats between two float32 computations of a log-probability
EOS, OTHER_EOS, NEW = 2, 7, 12  # as in vllm_process


class Runs:
    """What happened in one process, and then in two."""

    def __init__(self, world: PolicyWorld, folder: Path) -> None:
        def plan(name: str, ranks: int, **changes: Any) -> AttemptConfig:
            return vllm_attempt(world, folder / name, ranks, **changes)

        alone = {"whole": plan("whole", 1), "again": plan("again", 1)}
        together = {
            "shared": plan("shared", 2),
            "adapted": plan("adapted", 2, lora={"rank": 2}, deepspeed={"zero_stage": 3}),
            "rounded": plan("rounded", 2),
            "stale": plan("stale", 2, learning_rate=0.05),
            "early": plan("early", 2, learning_rate=0.05, steps=1),
        }
        self.configs = alone | together
        self.results = run_in_vllm(1, folder / "on-1", alone) | run_in_vllm(2, folder / "on-2", together)
        self.engine: dict[str, Any] = self.results.pop("engine")

    def history(self, name: str) -> list[dict[str, float]]:
        assert self.results[name]["failureClass"] == FailureClass.SUCCESS, self.results[name]["message"]
        return history(self.configs[name])


@pytest.fixture(scope="module")
def world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PolicyWorld:
    return make_vllm_world(tmp_path_factory.mktemp("vllm-world"), tiny_world)


@pytest.fixture(scope="module")
def runs(world: PolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(world, tmp_path_factory.mktemp("vllm"))


def test_its_log_probabilities_are_those_of_the_tempered_distribution(runs: Runs) -> None:
    assert max(runs.engine["gaps"].values()) < EXACT
    assert runs.engine["gaps"].keys() == {"0.7", "1.0"}
    assert runs.engine["gapAtAnotherTemperature"] > 0.1, "negative control"


def test_its_draws_follow_the_tempered_distribution(runs: Runs) -> None:
    counts, logits = np.array(runs.engine["counts"]), np.array(runs.engine["logits"])

    def pvalue(temperature: float) -> float:
        expected = special.softmax(logits / temperature) * counts.sum()
        often = expected >= 5  # the approximation wants cells that are not nearly empty: the others become one
        seen, due = (np.append(each[often], each[~often].sum()) for each in (counts, expected))
        return float(stats.chisquare(seen, due).pvalue)

    assert pvalue(0.7) > 1e-3
    assert pvalue(1.0) < 1e-9, "negative control"


def test_a_key_gives_the_same_reply_again_and_in_any_company(runs: Runs) -> None:
    assert runs.engine["repeated"]
    assert runs.engine["alone"]
    assert runs.engine["distinct"] == 64, "and another key another reply"


def test_greedy_takes_the_most_probable(runs: Runs) -> None:
    assert runs.engine["greedy"]


def test_replies_end_with_the_end_of_sequence_or_at_the_limit(runs: Runs) -> None:
    """Also the reply to the longest prompt there is room for; another token that the model's generation_config.json
    calls an end is one like any other."""
    replies = runs.engine["replies"]
    assert {reason for _, reason in replies} == {"stop", "length"}
    for tokens, reason in replies:
        assert (tokens[-1] == EOS) == (reason == "stop")
        assert EOS not in tokens[:-1]
        assert reason == "stop" or len(tokens) == NEW
    assert any(OTHER_EOS in tokens[:-1] for tokens, _ in replies)


@pytest.mark.parametrize("given", ["loaded", "merged"])
def test_it_holds_the_weights_it_was_given_last(runs: Runs, given: str) -> None:
    assert runs.engine[given]["new"] < EXACT
    assert runs.engine[given]["old"] > 0.1, "negative control: those before"


def test_what_it_cannot_run_is_refused_in_words(runs: Runs) -> None:
    assert "engine is vllm, which cannot run the policy with 65 tokens of prompt and response" in runs.engine["refusal"]
    assert "max_position_embeddings=64" in runs.engine["refusal"]
    assert "choose engine local" in runs.engine["refusal"]


@pytest.mark.parametrize("name", ["whole", "shared", "adapted"])
def test_whole_attempts_sample_with_the_trainers_weights_in_every_step(
    runs: Runs, world: PolicyWorld, name: str
) -> None:
    """Tied heads; all weights, or adapters under ZeRO-3, which are gathered and merged for the sampler."""
    steps = runs.history(name)
    assert len(steps) == 3
    for step in steps:
        assert step["samplerGap"] < EXACT
        assert step["importanceRatioP95"] == pytest.approx(1.0, abs=EXACT)
    assert steps[-1]["kl"] != 0.0
    base, trained = load_file(world.base / "model.safetensors"), weights(runs.results[name])
    assert not all(torch.equal(trained[key], base[key]) for key in trained), "the weights had moved"


def test_a_run_is_repeated_bit_for_bit(runs: Runs) -> None:
    assert runs.history("again") == runs.history("whole")


def test_two_ranks_sample_what_one_does(runs: Runs) -> None:
    """Each has an engine of its own, and a sample the key that it has on any rank."""
    assert runs.history("shared")[0] == pytest.approx(runs.history("whole")[0], rel=1e-4, abs=1e-5)


def test_a_sampler_of_less_precision_is_weighed(runs: Runs) -> None:
    for step in runs.history("rounded"):
        assert 1e-3 < step["samplerGap"] < 0.1
        assert step["importanceRatioP95"] > 1.001
        assert step["importanceRatioMean"] == pytest.approx(1.0, abs=0.02), "of p / q under q"


def test_a_sampler_that_never_gets_the_weights_ends_the_run(runs: Runs) -> None:
    """The base's are right in the first step alone."""
    result = runs.results["stale"]
    assert result["failureClass"] != FailureClass.SUCCESS
    assert "it does not hold the trainer's weights" in result["message"]
    assert len(history(runs.configs["stale"])) >= 1


def test_what_the_gate_samples_is_compared_too(runs: Runs) -> None:
    """One step, after which the gate asks an engine that did not get what was learnt."""
    result = runs.results["early"]
    assert result["failureClass"] != FailureClass.SUCCESS
    assert result["step"] == 1
    assert "right after it was given the weights; it does not hold the trainer's weights" in result["message"]
