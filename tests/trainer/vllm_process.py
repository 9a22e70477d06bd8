"""What the tests of vLLM run where it is installed: the adapter's answers beside a full forward pass of the model that
it should hold, and whole attempts. Arguments are the attempts' files; one rank looks at the engine first."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trainer.config import Lora
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.exits import Invalid
from rlhf_trainer.generate.base import Completion, Request, SampleKey, SamplingParams
from rlhf_trainer.generate.vllm import VLLMGenerator
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.models.adapters import adapters, attach, merged_in_place, plain_state
from rlhf_trainer.models.policy import Batch, score_tokens
from rlhf_trainer.ranks import RankFiles
from rlhf_trainer.wire import AttemptConfig
from rlhf_trainer.worker import load_loop, run_attempt

CPU = torch.device("cpu")
EOS, OTHER_EOS = 2, 7  # the tokenizer's, and one more that generation_config.json names
LENGTH, NEW = 40, 12  # tokens of prompt and response, of a response
DRAWS = 2000
PARAMS = SamplingParams(NEW, 0.7)
# Of 2 to 4 tokens and, last, the longest that there is room for.
PROMPTS = [tuple(3 + (5 * i + j) % 90 for j in range(2 + i % 3)) for i in range(63)]
PROMPTS.append(tuple(range(3, 3 + LENGTH - NEW)))


def main() -> None:
    os.environ["RLHF_STATUS_PORT"] = "0"
    world, paths = join(timedelta(seconds=600)), [Path(argument) for argument in sys.argv[1:]]
    folder = paths[0].parent
    if world.size == 1:
        (folder / "engine.result").write_text(json.dumps(look()))
    for path in paths:
        config = AttemptConfig.model_validate_json(path.read_bytes())
        with delivering(path.stem):
            result = run_attempt(config, load_loop(config.kind), world, RankFiles(folder, world.rank), StopSignal())
        if world.is_main:
            path.with_suffix(".result").write_text(result.to_json())
    leave()


@contextmanager
def delivering(name: str) -> Iterator[None]:
    """Weights arrive as they are, but for the attempts "stale", where they never do, "early", where they do for the
    first rollout alone, and "rounded"."""
    load, arrived = VLLMGenerator.load, []

    def rounded(engine: VLLMGenerator, weights: Iterable[tuple[str, Tensor]]) -> None:
        load(engine, [(key, value.bfloat16().to(value.dtype)) for key, value in weights])

    def early(engine: VLLMGenerator, weights: Iterable[tuple[str, Tensor]]) -> None:
        if not arrived:
            arrived.append(load(engine, weights))

    changed: dict[str, Any] = {"stale": lambda *_: None, "rounded": rounded, "early": early}
    VLLMGenerator.load = changed.get(name, load)  # type: ignore[method-assign]
    try:
        yield
    finally:
        VLLMGenerator.load = load  # type: ignore[method-assign]


def look() -> dict[str, Any]:
    """Everything the tests ask of one engine, in numbers."""
    with tempfile.TemporaryDirectory() as folder:
        base = model(0)
        base.generation_config.eos_token_id = [EOS, OTHER_EOS]
        base.save_pretrained(folder)
        return {"refusal": refusal(folder)} | answers(engine_of(folder, LENGTH), base)


def answers(engine: VLLMGenerator, base: Any) -> dict[str, Any]:
    asked = requests()
    first = engine.generate(asked, PARAMS)
    found: dict[str, Any] = {
        "gaps": {str(t): gap(engine, base, SamplingParams(NEW, t), t) for t in (0.7, 1.0)},
        "gapAtAnotherTemperature": gap(engine, base, PARAMS, 1.0),
        "repeated": engine.generate(asked, PARAMS) == first,
        "alone": [c.tokens for r in asked[:8] for c in engine.generate([r], PARAMS)] == [c.tokens for c in first[:8]],
        "distinct": len({c.tokens for c in engine.generate([Request((1, 5), r.key) for r in asked], PARAMS)}),
        "replies": [(c.tokens, c.finish_reason) for c in first],
        "greedy": greedy_agreement(engine, base),
        **first_tokens(engine, base),
    }
    other = model(5)
    engine.load(plain_state(other).items())
    found["loaded"] = {"new": gap(engine, other, PARAMS), "old": gap(engine, base, PARAMS)}
    adapted = model(0)
    attach(adapted, Lora(rank=2), seed=3)
    with torch.no_grad():
        for layer in adapters(adapted):
            layer.lora_B["default"].weight.normal_(std=0.1)
    with merged_in_place(adapted):
        engine.load(plain_state(adapted).items())
    found["merged"] = {"new": gap(engine, adapted, PARAMS), "old": gap(engine, base, PARAMS)}
    return found


def model(seed: int) -> Any:
    """A random model far from uniform, with fewer heads of keys than of queries and a head of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=121,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def engine_of(folder: str, length: int) -> VLLMGenerator:
    return VLLMGenerator(folder, eos_id=EOS, max_length=length, device=CPU, dtype=torch.float32)


def refusal(folder: str) -> str:
    """What is said of more tokens than the model has positions for."""
    try:
        engine_of(folder, 65)
    except Invalid as error:
        return str(error)
    return ""


def requests() -> list[Request]:
    return [Request(prompt, SampleKey(3, 1, index)) for index, prompt in enumerate(PROMPTS)]


def scored(lm: Any, asked: Sequence[Request], done: Sequence[Completion], temperature: float) -> Tensor:
    batch = Batch.of([request.prompt for request in asked], [each.tokens for each in done], 0, CPU)
    with torch.no_grad():
        return score_tokens(lm, batch, temperature).logprobs


def gap(engine: VLLMGenerator, lm: Any, params: SamplingParams, temperature: float = PARAMS.temperature) -> float:
    """The largest difference between the engine's log-probabilities of its draws and a full pass of ``lm``."""
    asked = requests()
    done = engine.generate(asked, params)
    full = scored(lm, asked, done, temperature)
    rows = zip(full, done, strict=True)
    return max(float((row[: len(c.logprobs)] - torch.tensor(c.logprobs)).abs().max()) for row, c in rows)


def greedy_agreement(engine: VLLMGenerator, lm: Any) -> bool:
    (done,) = engine.generate(requests()[:1], SamplingParams(NEW, 0.0))
    with torch.no_grad():
        logits = lm(torch.tensor([[*PROMPTS[0], *done.tokens]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    return bool(logits.argmax(dim=-1).tolist() == list(done.tokens))


def first_tokens(engine: VLLMGenerator, lm: Any) -> dict[str, Any]:
    """How often each token came first in many draws, and its logit."""
    keys = [Request(PROMPTS[0], SampleKey(9, 0, index)) for index in range(DRAWS)]
    counts = Counter(each.tokens[0] for each in engine.generate(keys, SamplingParams(1, PARAMS.temperature)))
    with torch.no_grad():
        logits = lm(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    return {"counts": [counts[token] for token in range(len(logits))], "logits": logits.tolist()}


if __name__ == "__main__":
    main()
