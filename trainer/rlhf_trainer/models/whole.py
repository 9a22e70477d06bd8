"""The whole weights a policy run needs beside its engine: the frozen reference, and what samples.

| trained | reference | samples |
|---|---|---|
| all weights | a copy | the engine's own model; under ZeRO-3 a replica, filled by one gather per rollout |
| adapters | the engine's model without them | the engine's model, merged for the while |
| adapters, ZeRO-3 | the replica without adapters | a replica merged for the while; the gather is of adapters alone |

(Gathering per token instead makes generation under ZeRO-3 tens of times slower.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_trainer.config import Lora, PolicyTraining
from rlhf_trainer.engine import Engine, compute_dtype
from rlhf_trainer.models.adapters import WithoutAdapters, attach, merged_in_place


class WholeWeights:
    """Made from the base ``lm`` before the engine shards it; attaches the adapters, if any."""

    def __init__(
        self,
        lm: Any,
        lora: Lora | None,
        *,
        seed: int,
        sharded: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        lm.to(device=device, dtype=dtype)
        self._adapted = lora is not None
        if lora is not None:
            attach(lm, lora, seed)
        plain = copy.deepcopy(lm).requires_grad_(False).eval() if sharded or not self._adapted else None
        self._replica = plain if sharded else None
        self.reference: Any = plain
        if self._adapted:
            self.reference = WithoutAdapters(self._replica if sharded else lm)
        elif sharded:
            self._replica = copy.deepcopy(plain)

    @classmethod
    def of_run(cls, lm: Any, training: PolicyTraining, device: torch.device) -> WholeWeights:
        return cls(
            lm,
            training.lora,
            seed=training.seed,
            sharded=training.deepspeed.zero_stage == 3,
            device=device,
            dtype=compute_dtype(training.precision, device),
        )

    @contextmanager
    def sampling(self, engine: Engine) -> Iterator[Any]:
        """The current policy's language model, whole and plain, until the context ends. Collective."""
        lm = self._current(engine)
        if self._adapted:
            with merged_in_place(lm):
                yield lm
        else:
            yield lm

    def _current(self, engine: Engine) -> Any:
        if self._replica is None:
            return engine.module.lm
        with engine.gathered(trained_only=True) as module:
            policy: Any = module
            trained = {name for name, parameter in policy.lm.named_parameters() if parameter.requires_grad}
            weights = {name: value for name, value in policy.lm.state_dict().items() if name in trained}
            self._replica.load_state_dict(weights, strict=False)
        return self._replica
