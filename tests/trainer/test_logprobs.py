"""Chunked log-probabilities and packed rows equal the plain computation, in values and in gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.algos.distillation import forward_kl
from rlhf_trainer.exits import Invalid
from rlhf_trainer.models import logprobs as logprobs_module
from rlhf_trainer.models import student as student_module
from rlhf_trainer.models.critic import SeparateCritic, SharedCritic
from rlhf_trainer.models.logprobs import token_logprobs
from rlhf_trainer.models.packing import PACKED_TYPES, packs, row_states
from rlhf_trainer.models.policy import ActorCritic, Batch, load_policy, score_tokens
from rlhf_trainer.models.student import Student
from tests.trainer.training_world import TinyWorld, run_ranks

CPU = torch.device("cpu")


def plain(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(states, weight, bias) / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def inputs(dtype: torch.dtype, rows: int = 6, hidden: int = 5, words: int = 11) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(rows, hidden), (words, hidden), (words,)]
    given = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return [*given, torch.tensor([0, 10, 3, 7, 7, 4][:rows])]


@pytest.mark.parametrize("numbers", [6, 18, 1000])  # one word a chunk, three, all
@pytest.mark.parametrize("biased", [True, False])
def test_chunked_gradients_are_those_of_finite_differences(numbers: int, biased: bool) -> None:
    states, weight, bias, targets = inputs(torch.float64)

    def function(states: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return token_logprobs(states, weight, rest[0] if rest else None, targets, 0.7, numbers)[0]

    assert torch.autograd.gradcheck(function, (states, weight, bias) if biased else (states, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("numbers", [12, 1000])
def test_chunked_values_and_gradients_equal_the_full_computation(dtype: torch.dtype, numbers: int) -> None:
    states, weight, bias, targets = inputs(dtype)
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    full = plain(*(each.double() for each in (states, weight, bias)), targets, 0.7)
    expected = torch.autograd.grad((full * upstream).sum(), (states, weight, bias))
    logprobs, entropy = token_logprobs(states, weight, bias, targets, 0.7, numbers)
    found = torch.autograd.grad((logprobs * upstream).sum(), (states, weight, bias))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), full, atol=tolerance, rtol=tolerance)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference.to(own.dtype), atol=tolerance, rtol=tolerance)
    distribution = torch.softmax((states @ weight.T + bias).double() / 0.7, -1)
    torch.testing.assert_close(
        entropy.double(), torch.special.entr(distribution).sum(-1), atol=tolerance, rtol=tolerance
    )
    assert not entropy.requires_grad


def test_extreme_logits_stay_finite() -> None:
    states = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(states, weight, None, torch.tensor([0, 0]), 1.0, chunk_numbers=2)
    torch.autograd.backward(logprobs.sum())
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert states.grad is not None
    assert weight.grad is not None
    assert torch.isfinite(states.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_no_tensor_of_tokens_times_vocabulary_is_kept() -> None:
    """What autograd keeps, and the largest tensor made, of a vocabulary that does not fit one chunk; the plain
    computation is the control."""
    states = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(5000, 8, requires_grad=True)
    targets = torch.arange(64)

    def chunked() -> Tensor:
        return token_logprobs(states, weight, None, targets, 1.0, chunk_numbers=64 * 100)[0]

    assert kept(chunked) < weight.numel() + states.numel() + 64 * 10
    assert kept(lambda: plain(states, weight, None, targets, 1.0)) >= 64 * 5000
    assert largest_made(chunked) <= max(weight.numel(), 64 * 100)
    assert largest_made(lambda: plain(states, weight, None, targets, 1.0)) == 64 * 5000


def kept(function: Callable[[], Tensor]) -> int:
    """Numbers held by the graph of a forward pass."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(found.values())


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def largest_made(function: Callable[[], Tensor]) -> int:
    """Numbers of the largest tensor that forward and backward make."""
    with _Largest() as seen:
        torch.autograd.backward(function().sum())
    return seen.numbers


# ---- packing -------------------------------------------------------------------------------------------------------

SHAPES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES |= {"num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 64, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 64}


def model_of(model_type: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A tiny random model whose attention is far from uniform, so that a row that sees another shows."""
    torch.manual_seed(1)
    shapes = GPT2 if model_type == "gpt2" else SHAPES
    config = AutoConfig.for_model(model_type, bos_token_id=1, eos_token_id=2, **{**shapes, **changes})
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return lm


PROMPTS = [[1, *range(3 + 5 * row, 3 + 5 * row + size)] for row, size in enumerate((2, 7, 3, 1, 12, 4))]
RESPONSES = [[(5 * row + step) % 37 + 3 for step in range(size)] for row, size in enumerate((9, 2, 5, 1, 8, 3))]
WEIGHTS = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))


def whole_batch() -> Batch:
    return Batch.of(PROMPTS, RESPONSES, 0, CPU)


def one_by_one(lm: Any) -> Tensor:
    """(B, T) by a plain forward pass of every row alone."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        rows.append(torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def padded(lm: Any, side: str) -> Tensor:
    """(B, T) by one forward pass of rows padded on one side, pad id 7 (a word), positions from the mask."""
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in given], batch_first=True, padding_value=filler, padding_side=side
        )
        for given, filler in ((rows, 7), ([[1] * len(row) for row in rows], 0))
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logprobs = torch.log_softmax(lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float(), -1)
    picked = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    real = (row[kept.bool()] for row, kept in zip(picked, mask[:, 1:] * mask[:, :-1], strict=True))
    return torch.nn.utils.rnn.pad_sequence(
        [row[-len(response) :] for row, response in zip(real, RESPONSES, strict=True)], batch_first=True
    )


def gradients(lm: Any, logprobs: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((logprobs * WEIGHTS).sum(), parameters, allow_unused=True))


@pytest.mark.parametrize("model_type", sorted(PACKED_TYPES))
def test_single_padded_and_packed_rows_agree(model_type: str) -> None:
    """Every architecture on the list keeps packed rows apart, and rows from their padding, in values and gradients."""
    lm = model_of(model_type)
    assert packs(lm.base_model)
    alone = one_by_one(lm)
    expected = gradients(lm, alone)
    for found in (score_tokens(lm, whole_batch(), 1.0).logprobs, padded(lm, "left"), padded(lm, "right")):
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-4)
        for own, each in zip(gradients(lm, found), expected, strict=True):
            assert own is not None
            scale = float(each.abs().max()) or 1.0
            torch.testing.assert_close(own / scale, each / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("critic", [SharedCritic, SeparateCritic])
def test_a_critic_reads_states_that_are_narrower_than_the_layers(critic: type[SharedCritic | SeparateCritic]) -> None:
    """OPT-350m's last layer has 1,024 numbers a token, and its heads are given 512."""
    shapes = {"word_embed_proj_dim": 8, "hidden_size": 16, "ffn_dim": 24}
    logprobs, values, _ = critic(model_of("opt", **shapes))(whole_batch(), 1.0)
    assert values.shape == logprobs.shape
    assert not values.any()


WORDS = 4000


def of_actor_critic() -> Tensor:
    logprobs, values, _ = ActorCritic(model_of("llama", vocab_size=WORDS))(whole_batch(), 0.9)
    return logprobs.sum() + values.sum()


def of_student() -> Tensor:
    teacher = model_of("llama", vocab_size=WORDS).requires_grad_(False)
    apart, _ = Student(model_of("llama", vocab_size=WORDS))(whole_batch(), teacher, forward_kl, 0.9)
    return apart


@pytest.mark.parametrize("module", [of_actor_critic, of_student])
def test_no_module_makes_a_tensor_of_tokens_times_vocabulary(
    module: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward with their models: nothing is larger than the weights, and the chunks are not kept either.
    Where one chunk has room for all (control), there is such a tensor."""
    tokens = sum(map(len, RESPONSES))
    assert largest_made(module) == tokens * WORDS <= kept(module)
    monkeypatch.setattr(logprobs_module, "CHUNK_NUMBERS", 4 * WORDS)
    monkeypatch.setattr(student_module, "_LOGITS_PER_CHUNK", 4 * WORDS)
    assert largest_made(module) == SHAPES["hidden_size"] * WORDS < tokens * WORDS
    assert kept(module) < tokens * WORDS


def test_rows_that_see_each_other_would_show() -> None:
    """Negative control: the same lines with positions that go on are read as one row each."""
    lm, batch = model_of("llama"), whole_batch()
    trunk = lm.base_model
    states, places = row_states(trunk, batch.ids, batch.prompt_lengths + batch.lengths)

    def without_restart(position_ids: Tensor, **given: Any) -> Any:
        return trunk(**given, position_ids=torch.arange(position_ids.shape[1])[None, :].expand_as(position_ids))

    without_restart.config = trunk.config  # type: ignore[attr-defined]
    mixed, _ = row_states(without_restart, batch.ids, batch.prompt_lengths + batch.lengths)
    assert len(states) < batch.ids.numel(), "rows share lines"
    ends = places[torch.arange(len(batch.ids)), batch.prompt_lengths + batch.lengths - 1]
    assert (mixed[ends] - states[ends]).abs().max().item() > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_is_not_listed_is_padded_and_agrees(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model_of("llama", attention)
    packed = score_tokens(lm, whole_batch(), 1.0).logprobs
    monkeypatch.setattr("rlhf_trainer.models.packing.PACKED_TYPES", frozenset())
    assert not packs(lm.base_model)
    torch.testing.assert_close(score_tokens(lm, whole_batch(), 1.0).logprobs, packed, atol=1e-4, rtol=1e-4)


def test_entropy_and_states_are_those_of_each_token() -> None:
    lm, batch = model_of("llama"), whole_batch()
    scored = score_tokens(lm, batch, 0.5)
    row, step = 4, 6
    logits = lm(input_ids=torch.tensor([PROMPTS[row] + RESPONSES[row]])).logits[0, len(PROMPTS[row]) - 1 + step] / 0.5
    assert float(scored.entropy[row, step]) == pytest.approx(
        float(torch.distributions.Categorical(logits=logits).entropy()), abs=1e-4
    )
    assert scored.entropy[3, 1:].abs().sum() == 0
    hidden = batch.spread(scored.states)
    assert hidden.shape == (6, 9, 16)
    torch.testing.assert_close(lm.get_output_embeddings()(hidden[row, step]) / 0.5, logits, atol=1e-3, rtol=1e-4)


ZERO3 = """
import json, sys
from datetime import timedelta
import torch
torch.set_num_threads(1)
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.models import logprobs
from rlhf_trainer.models.policy import ActorCritic
from tests.trainer.test_logprobs import model_of, whole_batch
logprobs.CHUNK_NUMBERS = 100
world, report = join(timedelta(seconds=600)), {}
for tied in (True, False):
    for stage in (0, 3):
        lm = model_of("llama")
        lm.config.tie_word_embeddings = tied
        lm.tie_weights() if tied else None
        engine = Engine(ActorCritic(lm), EngineOptions(stage, 0.01, rows_per_step=6), world)
        engine.module.eval()
        losses = []
        for _ in range(3):
            values, _, _ = engine(whole_batch(), 0.9)
            losses.append(engine.backward(-values.sum() / 28))
            engine.step()
        report[f"{tied}/{stage}"] = losses + [engine.gradient_norm]
        engine.close()
open(sys.argv[1], "w").write(json.dumps(report))
leave()
"""


def test_a_sharded_head_is_whole_when_its_chunks_are_computed(tmp_path: Path) -> None:
    """ZeRO-3, tied and untied, many chunks: the trajectory of the unsharded engine."""
    done = run_ranks(ZERO3, 1, tmp_path, str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report").read_text())
    for tied in (True, False):
        assert report[f"{tied}/3"] == pytest.approx(report[f"{tied}/0"], rel=1e-4)
        assert report[f"{tied}/0"][2] < report[f"{tied}/0"][0] - 0.1
    assert report["True/0"][0] != pytest.approx(report["False/0"][0], rel=0.01)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_model_that_scales_its_logits_after_the_head_is_refused(
    scale: float, tmp_path: Path, tiny_world: TinyWorld
) -> None:
    """Granite divides them: the trainer would learn, and report, another distribution than the one that is sampled."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.base)
    lm = model_of("granite", vocab_size=len(tokenizer), logits_scaling=scale)
    logits = lm(input_ids=torch.tensor([PROMPTS[4] + RESPONSES[4]])).logits[0, len(PROMPTS[4]) - 1 : -1]
    own = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(RESPONSES[4])[:, None])[:, 0]
    ours = score_tokens(lm, Batch.of([PROMPTS[4]], [RESPONSES[4]], 0, CPU), 1.0).logprobs[0]
    assert (float((own - ours).abs().max()) < 1e-4) is (scale == 1.0)
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if scale == 1.0:
        load_policy(tmp_path)
        return
    with pytest.raises(Invalid, match=r"granite changes its logits after the head \(logits_scaling 4.0\)"):
        load_policy(tmp_path)
