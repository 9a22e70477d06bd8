"""What vLLM itself, in ``test_vllm``, does not do: be missing, and end a reply where the trainer sees no end."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import Request, SampleKey, SamplingParams
from rlhf_trainer.generate.vllm import VLLMGenerator


def make() -> VLLMGenerator:
    return VLLMGenerator("/policy", eos_id=2, max_length=64, device=torch.device("cpu"), dtype=torch.float32)


class Cutting:
    """vLLM's ``LLM`` as far as it is asked here; it stops at a token that is not the end of sequence."""

    def __init__(self, **_: Any) -> None:
        self.llm_engine = SimpleNamespace(engine_core=None)

    def generate(self, prompts: list[Any], params: list[Any], **_: Any) -> list[Any]:
        found = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        return [SimpleNamespace(outputs=[found]) for _ in zip(prompts, params, strict=True)]


def test_without_vllm_the_run_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Invalid, match="use an image with vllm, or engine local"):
        make()


def test_an_end_without_end_of_sequence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = Cutting, lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(RuntimeError, match=r"for the reason 'stop' with token \(5,\)"):
        make().generate([Request((1, 7), SampleKey(3, 1, 0))], SamplingParams(1, 0.7))
