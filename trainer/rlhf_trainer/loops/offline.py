"""What every algorithm that learns from given texts shares: one engine, the reference, the order of rows, the step.

A step takes ``promptsPerStep`` rows over all ranks and updates once. Rows and learning rate are functions of
(seed, step), so a checkpoint is the engine and one number.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from rlhf_trainer.data.sampler import Position, Sampler
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.generate.base import SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.batching import micro_rows
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.models.policy import load_policy
from rlhf_trainer.models.whole import WholeWeights
from rlhf_trainer.preflight_training import learnt_rows


class OfflineTrainer(ABC):
    """A ``PolicyTrainer``; an algorithm adds its rows and their gradient."""

    responses_per_row = 1  # texts in the forward pass of one row

    def __init__(self, session: Session, inputs: PolicyInputs, wrap: Callable[[Any], nn.Module]) -> None:
        self.session, self.inputs = session, inputs
        self.world, self.training = session.world, inputs.training
        lm, _ = load_policy(inputs.policy.path)
        self._whole = WholeWeights.of_run(lm, self.training, self.world.device)
        self.reference = self._whole.reference
        self.engine = Engine(wrap(lm), self._engine_options(), self.world)
        self.engine.module.eval()  # dropout off: the log-ratio of an unchanged policy must be 0
        generation = self.training.generation
        self.params = SamplingParams(generation.max_new_tokens, generation.temperature)
        self.pad_id = inputs.encoder.pad_id

    @abstractmethod
    def rows(self) -> int:
        """How many rows there are to train on. Called once, before the first step; collective."""

    @abstractmethod
    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        """All backward passes of the next step over ``rows`` (of all ranks); returns figures equal on all ranks.

        The step's index is ``session.done``.
        """

    def train(self, after_step: Callable[[int], None]) -> None:
        training, session = self.training, self.session
        batch, size = training.prompts_per_step, self.rows()
        done = session.begin({"engine": self.engine}, training.steps)
        sampler = Sampler(size, Position.after(done * batch, size, training.seed))
        for step in range(done, training.steps):
            began = time.monotonic()
            figures = self.gradients(sampler.take(batch))
            rate = training.learning_rate * (training.steps - step) / training.steps
            self.engine.step(rate)
            seconds = self.world.means({"step": time.monotonic() - began})["step"]
            figures |= {
                "learningRate": rate,
                "trainSeconds": seconds - figures.get("generateSeconds", 0.0),
                "samplesPerSecond": batch * training.samples_per_prompt / seconds,
                "gradientNorm": self.engine.gradient_norm,
            }
            session.finish_step(step + 1, figures)
            after_step(step + 1)

    def sampling_lm(self) -> Any:
        """Context manager: the current policy's language model with whole weights. Collective."""
        return self._whole.sampling(self.engine)

    def generator(self, lm: Any) -> CachedGenerator:
        return CachedGenerator(lm, pad_id=self.pad_id, eos_id=self.inputs.encoder.eos_id)

    def mine(self, rows: Sequence[int]) -> Sequence[int]:
        """This rank's share of a batch."""
        return rows[self.world.share(len(rows))]

    def shares(self) -> int:
        """What a share of a global mean is multiplied by before ``engine.backward``, which averages over ranks and
        passes."""
        return self.world.size * len(self.engine.micro_batches())

    def _engine_options(self) -> EngineOptions:
        rows = learnt_rows(self.training)
        return EngineOptions(
            zero_stage=self.training.deepspeed.zero_stage,
            learning_rate=self.training.learning_rate,
            rows_per_step=rows,
            micro_rows=micro_rows(self.training, rows // self.world.size, self.responses_per_row),
            max_grad_norm=1.0,
            precision=self.training.precision,
        )


class Sums:
    """Named sums over rows or tokens of this rank, turned into global means."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def over(self, world: Any) -> dict[str, float]:
        """The sums over all ranks, equal on all."""
        total: dict[str, float] = world.sums(self._sums)
        return total


def ratio(total: float, count: float) -> float:
    """A mean, 0 where there was nothing to average."""
    return total / count if count else 0.0
