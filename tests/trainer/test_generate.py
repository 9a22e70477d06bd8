"""Sampling equals the model it samples from, whatever the batch around it looks like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.generate import cached
from rlhf_trainer.generate.base import Completion, Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator, draw, new_cache
from rlhf_trainer.models.policy import Batch, score_tokens
from rlhf_trainer.randomness import Stream

PARAMS = SamplingParams(max_new_tokens=12, temperature=0.8)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random two-layer model whose distributions are far from uniform, so that mistakes show."""
    lm = build_model(build_tokenizer(), width=16, seed=1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return lm.eval()


def requests(count: int = 24) -> list[Request]:
    """Prompts of 2 to 9 tokens; the ids include 0, the pad id."""
    return [Request(tuple((7 * i + j) % 40 for j in range(2 + i % 8)), SampleKey(5, 2, i)) for i in range(count)]


def sample(model: Any, asked: list[Request], params: SamplingParams = PARAMS, **options: Any) -> list[Completion]:
    options = {"pad_id": 0, "eos_id": 2, **options}
    return CachedGenerator(model, **options).generate(asked, params)


def test_log_probabilities_equal_a_full_forward_pass(model: Any) -> None:
    asked = requests()
    done = sample(model, asked)
    batch = Batch.of([r.prompt for r in asked], [c.tokens for c in done], 0, torch.device("cpu"))
    with torch.no_grad():
        full = score_tokens(model, batch, PARAMS.temperature).logprobs
    for row, completion in enumerate(done):
        assert full[row, : len(completion.tokens)].tolist() == pytest.approx(completion.logprobs, abs=1e-5)
        assert full[row, len(completion.tokens) :].abs().sum() == 0


def test_a_row_scores_the_same_alone_and_padded_among_others(model: Any) -> None:
    asked = requests()
    done = sample(model, asked)
    with torch.no_grad():
        together = score_tokens(
            model, Batch.of([r.prompt for r in asked], [c.tokens for c in done], 0, torch.device("cpu")), 1.0
        )
        for row, (request, completion) in enumerate(zip(asked, done, strict=True)):
            alone = score_tokens(model, Batch.of([request.prompt], [completion.tokens], 0, torch.device("cpu")), 1.0)
            size = len(completion.tokens)
            torch.testing.assert_close(together.logprobs[row, :size], alone.logprobs[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.entropy[row, :size], alone.entropy[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_batch", [1, 5, 64])
def test_samples_do_not_depend_on_the_batch_layout(model: Any, max_batch: int) -> None:
    asked = requests()
    whole = sample(model, asked)
    shuffled = [asked[i] for i in np.random.default_rng(0).permutation(len(asked))]
    other = dict(zip([r.key for r in shuffled], sample(model, shuffled, max_batch=max_batch), strict=True))
    for request, completion in zip(asked, whole, strict=True):
        assert other[request.key].tokens == completion.tokens
        assert other[request.key].logprobs == pytest.approx(completion.logprobs, abs=1e-5)


def test_the_cache_is_as_long_as_a_batch_of_similar_prompts_needs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts of each length from 2 to 9, mixed, four at a time: a batch's longest prompt and 2 tokens."""
    lengths: list[int] = []

    def recorded(config: Any, length: int) -> Any:
        lengths.append(length)
        return new_cache(config, length)

    monkeypatch.setattr(cached, "new_cache", recorded)
    sample(model, requests(24), SamplingParams(2), max_batch=4)
    assert lengths == [longest + 2 for longest in (3, 4, 5, 7, 8, 9)]


@pytest.mark.parametrize("window", [None, 64])
def test_samples_of_a_prompt_read_it_once(model: Any, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four samples of each of three prompts, out of order, are those that each gets alone; also with the cache that
    models with a sliding window get."""
    monkeypatch.setattr(model.config, "sliding_window", window, raising=False)
    asked = [Request(request.prompt, SampleKey(5, 2, index)) for index, request in enumerate(requests(3) * 4)]
    rows: list[int] = []

    def counted(_module: Any, _given: Any, keywords: Any) -> None:
        rows.append(len(keywords["input_ids"]))

    with model.register_forward_pre_hook(counted, with_kwargs=True):
        together = sample(model, asked, eos_id=-1)
    assert (rows[0], rows[1]) == (3, 12)
    for request, completion in zip(asked, together, strict=True):
        (alone,) = sample(model, [request], eos_id=-1)
        assert completion.tokens == alone.tokens
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert len({completion.tokens for completion in together}) == 12


def test_the_pad_id_has_no_influence(model: Any) -> None:
    assert [c.tokens for c in sample(model, requests(), pad_id=0)] == [
        c.tokens for c in sample(model, requests(), pad_id=39)
    ]


def test_each_part_of_a_key_gives_other_samples(model: Any) -> None:
    prompt = (1, 5, 6, 7)
    keys = [SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1)]
    keys.append(SampleKey(0, 0, 0, Stream.EVALUATION))
    drawn = [c.tokens for c in sample(model, [Request(prompt, key) for key in keys], eos_id=-1)]
    assert len(set(drawn)) == len(keys)


def test_a_longer_limit_begins_with_the_shorter(model: Any) -> None:
    short = sample(model, requests(), SamplingParams(4), eos_id=-1)
    long = sample(model, requests(), SamplingParams(9), eos_id=-1)
    assert all(b.tokens[:4] == a.tokens for a, b in zip(short, long, strict=True))


def test_finish_reasons_say_whether_the_end_was_reached(model: Any) -> None:
    done = sample(model, requests(200))
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for completion in done:
        assert (completion.tokens[-1] == 2) == (completion.finish_reason == "stop")
        assert 2 not in completion.tokens[:-1]
        assert len(completion.tokens) == len(completion.logprobs) <= PARAMS.max_new_tokens


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(len(uniform), -1), uniform, temperature=0.5)
    expected = torch.softmax(logits.double() / 0.5, -1)
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=0)
    counts = torch.bincount(tokens, minlength=4).numpy()
    assert stats.chisquare(counts, expected.numpy() * len(uniform)).pvalue > 1e-3
    # Negative control: the untempered distribution is refused by the same test.
    assert stats.chisquare(counts, torch.softmax(logits.double(), -1).numpy() * len(uniform)).pvalue < 1e-9


def test_the_ends_of_the_unit_interval_stay_inside_the_vocabulary() -> None:
    logits = torch.zeros(2, 3)
    tokens, _ = draw(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [0, 2]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 0.5, 1 - 1e-12):
        assert draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)[0].item() == 1


def test_greedy_takes_the_most_probable() -> None:
    assert draw(torch.tensor([[0.1, 3.0, 0.2]]), torch.tensor([0.99]), 0.0)[0].item() == 1


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 1.0), (4, -0.1)])
def test_impossible_parameters_are_refused(tokens: int, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens|temperature"):
        SamplingParams(tokens, temperature)


def test_the_training_mode_of_the_model_is_kept(model: Any) -> None:
    model.train()
    sample(model, requests(2))
    assert model.training
    model.eval()
