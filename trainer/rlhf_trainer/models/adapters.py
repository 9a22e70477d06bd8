"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on the linear layers of a frozen model.

attach(lm, lora, seed)          adapters train, the model below them is frozen
WithoutAdapters(lm)             the same model as it was: the reference of a policy, without a second copy
merged(state, lm)               plain weights W + (alpha / r) B A under plain names: for sampling and artifacts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_trainer.config import Lora
from rlhf_trainer.exits import Invalid
from rlhf_trainer.randomness import Stream, torch_generator

_NAME = "default"
_DOWN, _UP = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
_FROZEN = "frozen_weight"  # attribute of a layer that holds merged weights
_FIRST_DRAW = 1 << 20  # of the initialisation stream: reward members draw their heads from the first numbers


def attach(model: Any, lora: Lora, seed: int, member: int = 0) -> None:
    """Puts adapters on the linear layers of ``model``'s trunk that ``lora`` names, all of them by default, and freezes
    everything else but heads outside the trunk that are new (``score``).

    B starts at 0, so the model still says what it said. A is drawn by (seed, member, layer). Raises Invalid when
    a named layer does not exist.
    """
    layers = {name: module for name, module in model.base_model.named_modules() if isinstance(module, _LINEAR)}
    chosen = {name for name in layers if not lora.target_modules or name.rpartition(".")[2] in lora.target_modules}
    missing = set(lora.target_modules) - {name.rpartition(".")[2] for name in chosen}
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise Invalid(f"training.lora.targetModules: no linear layer {', '.join(sorted(missing))}; there are {known}")
    model.requires_grad_(False)
    transposed = any(isinstance(layers[name], Conv1D) for name in chosen)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(Any, lora.alpha),
        lora_dropout=0.0,
        target_modules=sorted(chosen),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model.base_model, _NAME)
    for index, layer in enumerate(adapters(model)):
        down = layer.lora_A[_NAME].weight
        draw = torch_generator(seed, Stream.INITIALISATION, step=_FIRST_DRAW + member, sample=index)
        with torch.no_grad():
            # As for any linear layer: uniform with variance 1 / (3 inputs).
            bound = down.shape[1] ** -0.5
            down.copy_(torch.rand(down.shape, generator=draw) * 2 * bound - bound)
    head = getattr(model, "score", None)
    if isinstance(head, nn.Module):
        head.requires_grad_(True)


_LINEAR = (nn.Linear, Conv1D)


def adapters(model: nn.Module) -> list[Any]:
    """The adapted layers of ``model``, in its order."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` answers as it did before ``attach``, to the bit, also inside ``merged_in_place``."""
    layers = adapters(model)
    before = [(layer._disable_adapters, layer.get_base_layer().weight.data) for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # not enable_adapters(): that also changes which parameters are trained
        layer.get_base_layer().weight.data = vars(layer).get(_FROZEN, layer.get_base_layer().weight.data)
    try:
        yield
    finally:
        for layer, (was, weight) in zip(layers, before, strict=True):
            layer._disable_adapters = was
            layer.get_base_layer().weight.data = weight


class WithoutAdapters:
    """A view of an adapted causal LM as the model it was, for whoever reads log-probabilities or samples from it."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    @property
    def base_model(self) -> Any:
        return _Disabled(self._lm.base_model, self._lm)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self._lm):
            return self._lm(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)


class _Disabled:
    def __init__(self, trunk: Any, lm: Any) -> None:
        self._trunk, self._lm = trunk, lm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self._lm):
            return self._trunk(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


def merged(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` (whole weights of ``model``, adapters and all) as the weights of the plain model; without adapters it
    is returned as it is. Nothing in ``state`` is changed."""
    scales = {name: (layer.scaling[_NAME], layer.fan_in_fan_out) for name, layer in _named(model)}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        owner, _, kind = name.rpartition(".base_layer.")
        if owner not in scales:
            if ".lora_" not in name:
                plain[name] = value
            continue
        scale, transposed = scales[owner]
        if kind == "weight":
            update = scale * (state[owner + _UP].float() @ state[owner + _DOWN].float())
            value = (value.float() + (update.T if transposed else update)).to(value.dtype)
        plain[f"{owner}.{kind}"] = value
    return plain


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model`` under the names from before ``attach``; inside ``merged_in_place``, merged weights."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def _named(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def merged_in_place(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` holds merged weights and its adapters are off: what sampling wants, a plain model per token.

    The frozen weights are put back untouched, not computed back, so rounding never creeps into the base.
    """
    layers = adapters(model)
    with torch.no_grad(), disabled(model):
        try:
            for layer in layers:
                weight = layer.get_base_layer().weight.data
                vars(layer)[_FROZEN] = weight
                layer.get_base_layer().weight.data = weight + layer.get_delta_weight(_NAME).to(weight.dtype)
            yield
        finally:
            for layer in layers:
                vars(layer).pop(_FROZEN, None)
