"""The one DeepSpeed engine: every loop trains through it, whatever the ZeRO stage, device or world size.

Torch's AdamW is handed in (``zero_allow_untested_optimizer``) so that no CUDA or C++ extension is compiled at start:
pods have a read-only root and need no compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_trainer.config import Precision
from rlhf_trainer.deepspeed_import import deepspeed, make_universal
from rlhf_trainer.distributed import World
from rlhf_trainer.exits import Diverged, Invalid
from rlhf_trainer.waiting import on_main

_TAG = "engine"


@dataclass(frozen=True)
class EngineOptions:
    """``rows_per_step`` counts samples over all ranks per optimiser step; ``micro_rows`` per rank and backward pass."""

    zero_stage: int
    learning_rate: float
    rows_per_step: int
    micro_rows: int | None = None  # None: one backward pass per step
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # 0: no clipping
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    precision: Precision = Precision.AUTO


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of weights and activations; optimiser state and master weights are float32 in any case."""
    if precision is Precision.AUTO:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32


class Engine:
    """A module sharded over the ranks together with its optimiser.

    Per optimiser step, on every rank: for each slice of ``micro_batches()``: ``forward`` (or the module's own methods
    through ``module``) then ``backward(loss)``; then ``step()`` once. Losses are means over the rows of a slice.
    """

    def __init__(self, module: nn.Module, options: EngineOptions, world: World) -> None:
        self.options = options
        self.world = world
        self._rows = self._rows_per_rank()
        self._micro = options.micro_rows or self._rows
        self._pending = 0
        self._gradient_norm = 0.0
        self._numel = sum(parameter.numel() for parameter in module.parameters())
        if self._rows % self._micro:
            raise Invalid(f"{self._rows} rows per rank do not divide into micro batches of {self._micro}")
        module.to(world.device)
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, options.weight_decay),
            lr=options.learning_rate,
            betas=options.adam_betas,
            eps=options.adam_eps,
        )
        # DeepSpeed prints through its own logger at INFO for every start; the loops report instead.
        deepspeed.logger.setLevel("WARNING")
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._config(), dist_init_required=False
        )
        if options.zero_stage == 0 and self._engine.bfloat16_enabled():
            _forget_first_step(self._engine.optimizer)

    @property
    def module(self) -> nn.Module:
        """The wrapped module; under ZeRO-3 its parameters are whole only inside a forward or ``gathered()``."""
        module: nn.Module = self._engine.module
        return module

    @property
    def learning_rate(self) -> float:
        return float(self._engine.optimizer.param_groups[0]["lr"])

    @property
    def micro_rows(self) -> int:
        """Rows of this rank in one backward pass."""
        return self._micro

    def micro_batches(self) -> list[slice]:
        """Slices of this rank's rows of one optimiser step, one per backward pass."""
        return [slice(start, start + self._micro) for start in range(0, self._rows, self._micro)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    __call__ = forward

    def backward(self, loss: torch.Tensor) -> float:
        """Accumulates the gradient of ``loss``, this rank's mean over one slice; returns its mean over the ranks.

        Raises ``Diverged`` on every rank alike when the loss of any is not finite, before any weight is touched.
        """
        mean = self.world.means({"loss": float(loss.detach())})["loss"]
        _require_finite("training loss", mean)
        self._close_micro_step()
        self._engine.backward(loss)
        self._pending += 1
        return mean

    def step(self, learning_rate: float | None = None) -> None:
        """Updates the weights from the slices seen since the last step, at ``learning_rate`` if given.

        Raises ``Diverged`` on every rank alike, weights untouched, when the gradient is not finite: a finite loss can
        have such a one.
        """
        if learning_rate is not None:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = learning_rate
        expected = self._rows // self._micro
        if self._pending != expected:
            raise RuntimeError(f"step() after {self._pending} of {expected} backward passes; see micro_batches()")
        if self.options.zero_stage == 0:  # whole gradients, already averaged; DeepSpeed keeps no norm of them
            gradients = [each.grad.float() for each in self.module.parameters() if each.grad is not None]
            self._gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
            _require_finite("gradient's norm", self._gradient_norm)
        self._engine.step()
        self._pending = 0
        if self.options.zero_stage > 0:  # DeepSpeed leaves the update out, without a word
            self._gradient_norm = float(self._engine.get_global_grad_norm() or 0.0)
            _require_finite("gradient's norm", self._gradient_norm)

    @property
    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        return self._gradient_norm

    @contextmanager
    def gathered(self, modify: bool = False, trained_only: bool = False) -> Iterator[nn.Module]:
        """The module with whole parameters (ZeRO-3 gathers them once): for generation, saving and, with ``modify``,
        changes made on rank 0; with ``trained_only`` frozen ones stay sharded. Every rank must enter it."""
        parameters = [each for each in self.module.parameters() if each.requires_grad or not trained_only]
        if self.options.zero_stage < 3:
            yield self.module
            return
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
            yield self.module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Whole float32 weights on the CPU of rank 0, empty elsewhere. Collective."""
        with self.gathered() as module:
            if not self.world.is_main:
                return {}
            return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in _state(module)}

    def save(self, folder: Path) -> None:
        """Model, optimiser and loss-scale state of every rank below ``folder``. Collective."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote at the same world size and ZeRO stage. Collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state to load at this ZeRO stage and world size")

    def load_resharded(self, folder: Path, scratch: Path, alive: Callable[[], None]) -> None:
        """Restores what ``save`` wrote at the same ZeRO stage by another number of ranks. Collective.

        Stage 0 has nothing sharded. Otherwise rank 0 makes DeepSpeed's universal checkpoint of it in ``scratch``: one
        file per parameter and optimiser moment, of which every rank reads its new share.
        """
        if self.options.zero_stage == 0:
            self.load(folder)
            return
        on_main(self.world, lambda: make_universal(folder / _TAG, scratch / _TAG), alive)
        groups = self._engine.optimizer.param_groups
        own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._engine._config.load_universal_checkpoint = True
        try:
            self.load(scratch)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # Stage 3 gives every group the settings of the first: vectors would suddenly decay.
        for group, settings in zip(groups, own, strict=True):
            group.update(settings)
        # It also gives all parameters one tensor as their step count, which Adam would then raise once for each.
        for state in getattr(self._engine.optimizer, "optimizer", self._engine.optimizer).state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def close(self) -> None:
        """Frees hooks and buffers; the engine cannot be used afterwards."""
        self._engine.destroy()

    def _close_micro_step(self) -> None:
        # DeepSpeed counts micro batches in its step(); before the boundary that call only counts.
        if 0 < self._pending < self._rows // self._micro:
            self._engine.step()

    def _rows_per_rank(self) -> int:
        rows, rest = divmod(self.options.rows_per_step, self.world.size)
        if rest or rows == 0:
            raise Invalid(
                f"a batch of {self.options.rows_per_step} rows does not divide over {self.world.size} ranks; "
                "choose a multiple of numNodes x numProcPerNode"
            )
        return rows

    def _config(self) -> dict[str, Any]:
        # DeepSpeed allocates whole buckets: gigabytes for a model of kilobytes unless they are bounded by its size.
        # Multiples of 4096 satisfy its alignment over any usual number of ranks.
        bucket = min(-(-self._numel // 4096) * 4096, 500_002_816)
        return {
            "train_batch_size": self.options.rows_per_step,
            "train_micro_batch_size_per_gpu": self._micro,
            "gradient_clipping": self.options.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.options.zero_stage,
                "overlap_comm": False,  # overlapping streams cost repeatability
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": min(bucket, 50_003_968),
                "stage3_param_persistence_threshold": 0,
            },
            "bf16": {"enabled": compute_dtype(self.options.precision, self.world.device) == torch.bfloat16},
            "steps_per_print": 2**31,  # never; 0 divides by zero
            "checkpoint": {"tag_validation": "Ignore"},
        }


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise Diverged(
            f"the {name} is {value}; lower learningRate or look for extreme values in the data; "
            "the last checkpoint is from before"
        )


def _forget_first_step(optimizer: Any) -> None:
    """DeepSpeed makes the states of its bfloat16 optimiser without ZeRO by a step without gradients. That step decays
    the master weights and counts in Adam's bias correction, so that the first real update would be a quarter short."""
    optimizer.refresh_fp32_params()
    optimizer.optimizer.state.clear()


def _parameter_groups(module: nn.Module, weight_decay: float) -> Sequence[dict[str, Any]]:
    """Matrices decay; biases, norms and other vectors do not (Loshchilov & Hutter's practice since GPT-2)."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.state_dict().items()
