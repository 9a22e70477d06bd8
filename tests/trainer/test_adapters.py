"""Adapters: what they leave alone, what they change, and that sampling and artifacts hold the merged weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_trainer.config import Lora
from rlhf_trainer.exits import Invalid
from rlhf_trainer.models.adapters import WithoutAdapters, adapters, attach, disabled, merged, merged_in_place
from rlhf_trainer.models.policy import reference_logprobs, score_tokens
from tests.trainer.test_logprobs import model_of, whole_batch
from tests.trainer.training_world import run_ranks

LORA = Lora(rank=3, alpha=6.0)


def adapted(model_type: str = "llama", lora: Lora = LORA, moved: bool = True) -> tuple[Any, Any]:
    """A base model, and a copy with adapters (moved away from zero, as training would)."""
    base = model_of(model_type)
    lm = copy.deepcopy(base)
    attach(lm, lora, seed=4)
    if moved:
        random = torch.Generator().manual_seed(5)
        for layer in adapters(lm):
            layer.lora_B["default"].weight.data.normal_(0, 0.3, generator=random)
    return base, lm


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None, :]).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_before_the_first_step_nothing_has_changed(model_type: str) -> None:
    base, lm = adapted(model_type, moved=False)
    torch.testing.assert_close(logits(lm), logits(base), atol=0, rtol=0)
    batch = whole_batch()
    with torch.no_grad():
        kl = score_tokens(lm, batch, 1.0).logprobs - reference_logprobs(WithoutAdapters(lm), batch, 1.0)
    assert kl.abs().max() == 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_the_reference_is_the_base_to_the_bit(model_type: str) -> None:
    base, lm = adapted(model_type)
    assert (logits(lm) - logits(base)).abs().max() > 0.05, "adapters that do nothing would pass"
    assert torch.equal(logits(WithoutAdapters(lm)), logits(base))
    batch = whole_batch()
    assert torch.equal(reference_logprobs(WithoutAdapters(lm), batch, 0.7), reference_logprobs(base, batch, 0.7))
    assert (logits(lm) - logits(base)).abs().max() > 0.05, "the view must leave the adapters on"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_merged_weights_say_the_same_without_adapters(model_type: str) -> None:
    base, lm = adapted(model_type)
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged(lm.state_dict(), lm))
    torch.testing.assert_close(logits(plain), logits(lm), atol=2e-4, rtol=1e-4)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    with merged_in_place(lm):
        assert torch.equal(logits(WithoutAdapters(lm)), logits(base)), "policy and reference are compared in there"
        torch.testing.assert_close(logits(lm), logits(plain), atol=2e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert torch.equal(logits(lm), logits(lm))
    with disabled(lm):
        assert torch.equal(logits(lm), logits(base))


def test_a_state_without_adapters_is_left_as_it_is() -> None:
    base = model_of("llama")
    assert merged(base.state_dict(), base).keys() == base.state_dict().keys()


def test_only_adapters_are_trained_and_named_layers_get_them() -> None:
    _, lm = adapted(lora=Lora(rank=2, target_modules=["q_proj", "v_proj"]))
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert len(adapters(lm)) == 4
    assert not any("lm_head" in name for name, _ in adapted()[1].named_parameters() if ".lora_" in name)


def test_adapters_are_drawn_by_seed_and_member_not_by_torch() -> None:
    def drawn(seed: int, member: int) -> torch.Tensor:
        torch.manual_seed(seed * 31 + member)
        lm = copy.deepcopy(model)
        attach(lm, LORA, seed, member)
        weight: torch.Tensor = adapters(lm)[0].lora_A["default"].weight
        torch.manual_seed(99)
        return weight

    model = model_of("llama")
    assert torch.equal(drawn(1, 0), drawn(1, 0))
    assert not torch.equal(drawn(1, 0), drawn(2, 0))
    assert not torch.equal(drawn(1, 0), drawn(1, 1))


def test_a_layer_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match=r"no linear layer qproj; there are .*q_proj"):
        attach(model_of("llama"), Lora(target_modules=["qproj"]), seed=0)


ENGINES = """
import json, sys
from datetime import timedelta
import torch
torch.set_num_threads(1)
from rlhf_trainer.config import Lora, Precision
from rlhf_trainer.distributed import join, leave
from rlhf_trainer.engine import Engine, EngineOptions, compute_dtype
from rlhf_trainer.models.adapters import merged
from rlhf_trainer.models.policy import ActorCritic, Batch, reference_logprobs, score_tokens
from rlhf_trainer.models.whole import WholeWeights
from tests.trainer.test_logprobs import PROMPTS, RESPONSES, model_of
from pathlib import Path
world, report, folder = join(timedelta(seconds=600)), {}, Path(sys.argv[1])
mine = world.share(6)
batch = Batch.of(PROMPTS[mine], RESPONSES[mine], 0, world.device)

def train(engine, steps):
    losses = []
    for _ in range(steps):
        logprobs, values, _ = engine(batch, 0.9)
        losses.append(engine.backward((-logprobs.sum() + values.square().sum()) / 9))
        engine.step()
    return losses

for precision in (Precision.FLOAT32, Precision.BFLOAT16):
    for stage in range(4):
        for lora in (Lora(rank=3, alpha=6.0), None):
            if precision is Precision.FLOAT32 and lora is None:
                continue
            name = f"{precision}/{stage}/{'lora' if lora else 'full'}"
            lm, dtype = model_of("llama"), compute_dtype(precision, world.device)
            base = {key: value.clone() for key, value in lm.state_dict().items()}
            whole = WholeWeights(lm, lora, seed=1, sharded=stage == 3, device=world.device, dtype=dtype)
            engine = Engine(ActorCritic(lm), EngineOptions(stage, 0.01, rows_per_step=6, precision=precision), world)
            engine.module.eval()
            with torch.no_grad():
                first = (engine(batch, 0.9)[0] - reference_logprobs(whole.reference, batch, 0.9)).abs().max()
            anchor = reference_logprobs(whole.reference, batch, 0.9)
            losses = train(engine, 3)
            engine.save(folder / name.replace("/", "-"))
            onward = train(engine, 2)
            engine.load(folder / name.replace("/", "-"))
            again = train(engine, 2)
            with torch.no_grad():
                trained = engine(batch, 0.9)[0]
            with whole.sampling(engine) as sampler:
                gap = (score_tokens(sampler, batch, 0.9).logprobs - trained).abs().max()
            kept = torch.equal(reference_logprobs(whole.reference, batch, 0.9), anchor)
            state = engine.state_dict()
            frozen = all(
                torch.equal(value, base[key.removeprefix("lm.").replace(".base_layer", "")])
                for key, value in state.items()
                if lora and ".lora_" not in key and "value_head" not in key
            )
            names = sorted(merged(state, engine.module)) if lora else sorted(state)
            report[name] = dict(
                first=float(first), losses=losses, onward=onward, again=again, gap=float(gap), kept=kept,
                frozen=frozen,
                names=names == sorted(["lm." + key for key in base] + ["value_head.bias", "value_head.weight"])
                or not world.is_main,
                dtype=str(next(engine.module.parameters()).dtype),
            )
            engine.close()
if world.is_main:
    (folder / "report.json").write_text(json.dumps(report))
leave()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapters and bfloat16 on the real engine at every ZeRO stage, two processes."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    done = run_ranks(ENGINES, 2, folder, str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("stage", range(4))
def test_adapters_train_alike_at_every_stage(report: dict[str, Any], stage: int) -> None:
    seen, expected = report[f"float32/{stage}/lora"], report["float32/0/lora"]
    assert seen["first"] == 0, "KL to the reference before the first step"
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert seen["losses"][2] < seen["losses"][0] - 0.01
    assert seen["again"] == seen["onward"], "adapters and their optimiser state are in the checkpoint"
    assert seen["gap"] < 1e-4, "the sampler holds the merged weights"
    assert seen["kept"], "the reference does not move"
    assert seen["frozen"]
    assert seen["names"], "merged weights have the plain model's names"


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_trains_on_the_cpu_too(report: dict[str, Any], stage: int, kind: str) -> None:
    seen = report[f"bfloat16/{stage}/{kind}"]
    assert seen["dtype"] == "torch.bfloat16"
    assert seen["first"] == 0
    assert seen["losses"] == pytest.approx(report[f"bfloat16/0/{kind}"]["losses"], rel=0.05)
    assert seen["losses"][2] < seen["losses"][0] - 0.01
    assert seen["again"] == seen["onward"]
    assert seen["gap"] < 0.3
