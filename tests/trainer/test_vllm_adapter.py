"""The vLLM adapter's side of the contract: what it asks, how it reads the answers. The engine itself cannot run here:
a stand-in with vLLM's classes records the calls and answers from the real cached generator."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate import base
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.generate.vllm import VLLMGenerator
from rlhf_trainer.models.adapters import merged, merged_in_place, plain_state
from tests.trainer.test_adapters import adapted
from tests.trainer.test_logprobs import model_of

PARAMS = base.SamplingParams(max_new_tokens=6, temperature=0.7)
REQUESTS = [base.Request((1, 5 + index, 9), base.SampleKey(3, 1, index)) for index in range(12)]


@dataclass
class Logprob:
    logprob: float


class Engine:
    """vLLM's ``LLM`` as far as the adapter uses it."""

    cut = False

    def __init__(self, **options: Any) -> None:
        self.options, self.asked, self.model = options, [], model_of("llama")
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.model.load_state_dict(dict(weights))

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.asked += params
        requests = [base.Request(tuple(each["prompt_token_ids"]), REQUESTS[0].key) for each in prompts]
        sampler = CachedGenerator(self.model, pad_id=0, eos_id=params[0].stop_token_ids[0])
        limits = base.SamplingParams(params[0].max_tokens, params[0].temperature)
        return [self._answer(completion) for completion in sampler.generate(requests, limits)]

    def _answer(self, completion: base.Completion) -> Any:
        found = [{t: Logprob(p)} for t, p in zip(completion.tokens, completion.logprobs, strict=True)]
        reason = "stop" if self.cut else completion.finish_reason
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=list(completion.tokens), logprobs=found, finish_reason=reason)]
        )


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> VLLMGenerator:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return VLLMGenerator("/policy", eos_id=2, max_length=64)


def test_without_vllm_the_run_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Invalid, match="use an image with vllm, or engine local"):
        VLLMGenerator("/policy", eos_id=2, max_length=64)


def test_it_keeps_the_promise_of_a_generator(sampler: VLLMGenerator) -> None:
    done = sampler.generate(REQUESTS, PARAMS)
    assert len(done) == len(REQUESTS)
    for completion in done:
        assert len(completion.tokens) == len(completion.logprobs) <= 6
        assert (completion.tokens[-1] == 2) == (completion.finish_reason == "stop")


def test_it_samples_from_the_whole_tempered_distribution(sampler: VLLMGenerator) -> None:
    sampler.generate(REQUESTS, PARAMS)
    engine: Any = sampler._engine
    assert engine.options["logprobs_mode"] == "processed_logprobs"
    assert {(p.top_p, p.top_k, p.temperature, p.max_tokens) for p in engine.asked} == {(1.0, 0, 0.7, 6)}
    assert len({p.seed for p in engine.asked}) == len(REQUESTS), "every sample has a seed of its own"


def test_weights_arrive_merged_and_under_plain_names(sampler: VLLMGenerator) -> None:
    _, lm = adapted()
    with merged_in_place(lm):
        sampler.load(plain_state(lm).items())
    engine: Any = sampler._engine
    for name, value in merged(lm.state_dict(), lm).items():
        torch.testing.assert_close(engine.model.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_an_end_without_end_of_sequence_is_an_error(sampler: VLLMGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "cut", True)
    with pytest.raises(RuntimeError, match="for the reason 'stop' with token"):
        sampler.generate(REQUESTS, base.SamplingParams(1, 0.7))
