"""Reinforcement learning against a reward model: one loop for PPO, GRPO, RLOO, REINFORCE++ and best of n.

    collect (rollout) → estimate (estimators) → passes of mini batches (objective) → controllers (KL, constraints)

One engine holds policy and critic; reference and reward model are frozen. Everything a step uses is a function of
(seed, step) and the weights, so a checkpoint is the engine, the two controllers and one number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_trainer.algos.kl import AdaptiveKL, FixedKL
from rlhf_trainer.checkpoint import Component
from rlhf_trainer.components import JsonState
from rlhf_trainer.config import Algorithm, Critic, GenerationEngine, KLController, PolicyTraining
from rlhf_trainer.data.sampler import Position, Sampler
from rlhf_trainer.engine import Engine, compute_dtype
from rlhf_trainer.generate.base import Generator, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.generate.vllm import VLLMGenerator
from rlhf_trainer.loops.batching import engine_options, micro_rows
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.constraints import Constraints, safety_filter
from rlhf_trainer.loops.estimators import Prices, Targets, estimate, kl_loss_coefficient
from rlhf_trainer.loops.objective import SUMS, Objective, Slice, loss_weights
from rlhf_trainer.loops.online_figures import loss_figures, sample_figures
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.rollout import Collector, Experience, refuse_foreign_weights, refuse_stale_sampler
from rlhf_trainer.loops.single_pass import Measured, learns_in_one_pass, needs_values
from rlhf_trainer.models.adapters import plain_state
from rlhf_trainer.models.critic import Actor, SeparateCritic, SharedCritic
from rlhf_trainer.models.policy import load_policy
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.models.whole import WholeWeights
from rlhf_trainer.randomness import Stream, generator


class OnlineTrainer:
    """Engine, reference, reward model, KL controller and multipliers of one run."""

    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        self._session, self._inputs = session, inputs
        self._world, self._training = session.world, inputs.training
        options = engine_options(self._training, self._world.size)
        self._filter = safety_filter(session.config, self._training)
        lm, _ = load_policy(inputs.policy.path)
        self._whole = WholeWeights.of_run(lm, self._training, self._world.device)
        self.reference = self._whole.reference
        self._vllm: VLLMGenerator | None = None  # made for the first rollout
        self.engine = Engine(_module(lm, self._training), options, self._world)
        self.engine.module.eval()  # dropout off: the ratio of an unchanged policy must be 1
        self.controller = _controller(self._training)
        self.constraints = Constraints(self._training.constraints)
        self._one_pass = learns_in_one_pass(self._training, len(self.engine.micro_batches()))
        self._params = SamplingParams(self._training.generation.max_new_tokens, self._training.generation.temperature)

    def sampling_lm(self) -> Any:
        """Context manager: the current policy's language model with whole weights. Collective."""
        return self._whole.sampling(self.engine)

    def generator(self, lm: Any) -> Generator:
        encoder, generation = self._inputs.encoder, self._training.generation
        if generation.engine is GenerationEngine.LOCAL:
            return CachedGenerator(lm, pad_id=encoder.pad_id, eos_id=encoder.eos_id)
        if self._vllm is None:
            self._vllm = self._make_vllm()
        self._vllm.load(plain_state(lm).items())
        prompts, seed = self._inputs.training_prompts, self._training.seed
        refuse_foreign_weights(lm, self._vllm, prompts, self._params, encoder.pad_id, seed)
        return self._vllm

    def _make_vllm(self) -> VLLMGenerator:
        """Made for the prompts that are there: ``maxPromptLength`` may leave more room than the model has."""
        inputs, device = self._inputs, self._world.device
        longest = max(len(prompt.ids) for prompt in (*inputs.training_prompts, *inputs.holdout_prompts))
        return VLLMGenerator(
            inputs.policy.path,
            eos_id=inputs.encoder.eos_id,
            max_length=longest + self._training.generation.max_new_tokens,
            device=device,
            dtype=compute_dtype(self._training.precision, device),
        )

    def train(self, after_step: Callable[[int], None]) -> None:
        """All remaining steps of the run; ``after_step(done)`` after each."""
        session, training = self._session, self._training
        done = session.begin(self._components(), training.steps)
        size = len(self._inputs.training_prompts)
        sampler = Sampler(size, Position.after(done * training.prompts_per_step, size, training.seed), Stream.PROMPTS)
        collector = self._collector()
        for step in range(done, training.steps):
            prompts = [self._inputs.training_prompts[row] for row in sampler.take(training.prompts_per_step)]
            experience = collector.collect(step, prompts)
            session.finish_step(step + 1, self._learn(step, experience))
            after_step(step + 1)

    def _components(self) -> dict[str, Component]:
        """All state that steps change."""
        components: dict[str, Component] = {
            "engine": self.engine,
            "klController": JsonState(self._world, self._kl_state, self._take_kl),
        }
        if self.constraints:
            components["constraints"] = JsonState(self._world, self.constraints.state, self.constraints.restore)
        return components

    def _learn(self, step: int, experience: Experience) -> dict[str, float]:
        began = time.monotonic()
        training, coefficient = self._training, self.controller.coefficient
        prices = Prices(coefficient, self.constraints.multipliers)
        warming = self._warm(step)
        objective = Objective(training, kl_loss_coefficient(training, prices), warming)
        rate = training.learning_rate * (training.steps - step) / training.steps
        if self._one_pass and needs_values(training):
            passes, (sums, experience, targets) = 1, self._whole_batch(step, experience, prices, objective, rate)
        else:
            targets = estimate(experience, training, prices)
            passes, sums, experience = self._passes(step, experience, targets, objective, rate)
        kl, costs = float(experience.kl.sum(dim=1).mean()), self.constraints.figures(experience)
        if not warming:  # a policy that stands still cannot answer to its prices
            self.controller.update(kl, len(experience.responses))
            self.constraints.update(experience)
        seconds = self._world.means({"trainSeconds": time.monotonic() - began})
        figures = sample_figures(experience, targets, training) | costs | seconds
        updates = passes * training.ppo.mini_batches
        figures |= loss_figures(sums, updates, training, objective.kl_coefficient)
        total = experience.generate_seconds + experience.score_seconds + seconds["trainSeconds"]
        figures |= {"klCoefficient": coefficient, "learningRate": rate, "kl": kl, "passes": float(passes)}
        return figures | {
            "samplesPerSecond": len(experience.responses) / total,
            "gradientNorm": sums["gradientNorm"] / updates,
        }

    def _warm(self, step: int) -> bool:
        """Whether values alone are trained in this step; tells the critic."""
        warming = self._training.algorithm is Algorithm.PPO and step < self._training.ppo.critic_warmup_steps
        module: Any = self.engine.module
        if self._training.algorithm is Algorithm.PPO:
            module.warming = warming
        return warming

    def _whole_batch(
        self, step: int, experience: Experience, prices: Prices, objective: Objective, rate: float
    ) -> tuple[dict[str, float], Experience, Targets]:
        """The only pass over a batch that one backward pass holds: its values first, then what to learn from them."""
        device, measured = self._world.device, Measured(experience)
        share = self._world.share(len(experience.responses))
        mine = range(len(experience.responses))[share]
        batch = experience.batch(mine, self._inputs.encoder.pad_id, device)
        outputs = self.engine(batch, self._params.temperature)
        measured.add(mine, *outputs)
        experience = measured.of_all_ranks(self._world)
        refuse_stale_sampler(step, experience)
        targets = estimate(experience, self._training, prices)
        weights = loss_weights(experience.lengths, targets.mask.shape[1], self._training)[share]
        logprobs, values, _ = outputs
        losses = objective(logprobs, values, Slice.of(experience, targets, weights, mine, batch.width, device))
        self.engine.backward(losses.total * self._world.size)
        self.engine.step(rate)
        sums = self._world.sums(dict(zip(SUMS, losses.sums.tolist(), strict=True)))
        return sums | {"gradientNorm": self.engine.gradient_norm}, experience, targets

    def _passes(
        self, step: int, experience: Experience, targets: Targets, objective: Objective, rate: float
    ) -> tuple[int, dict[str, float], Experience]:
        """Passes over the batch until ``ppo.epochs`` or ``ppo.targetKl``; their number, all ranks' sums (of gradient
        norms over updates), and the experience with what a single pass has measured."""
        ppo, total, norms = self._training.ppo, dict.fromkeys(SUMS, 0.0), 0.0
        measured = Measured(experience) if self._one_pass else None
        for epoch in range(ppo.epochs):
            seen = torch.zeros(len(SUMS), dtype=torch.float64, device=self._world.device)
            order = generator(self._training.seed, Stream.MINI_BATCHES, step, epoch)
            for rows in _mini_batches(targets.rows, ppo.mini_batches, self._training.prompts_per_step, order):
                seen += self._mini_batch(rows.tolist(), experience, targets, objective, measured)
                self.engine.step(rate)
                norms += self.engine.gradient_norm  # of all ranks' gradient
            # Summed over the ranks, so that all of them end the passes together.
            sums = self._world.sums(dict(zip(SUMS, seen.tolist(), strict=True)))
            total = {name: total[name] + sums[name] for name in SUMS}
            if ppo.target_kl is not None and sums["approxKl"] / sums["tokens"] > ppo.target_kl:
                break
        if measured is not None:
            experience = measured.of_all_ranks(self._world)
            refuse_stale_sampler(step, experience)
        return epoch + 1, total | {"gradientNorm": norms}, experience

    def _mini_batch(
        self,
        rows: Sequence[int],
        experience: Experience,
        targets: Targets,
        objective: Objective,
        measured: Measured | None,
    ) -> Tensor:
        """Gradient of one mini batch; returns this rank's sums over its tokens, in the order of ``SUMS``."""
        device = self._world.device
        width = targets.mask.shape[1]
        weights = loss_weights(experience.lengths[list(rows)], width, self._training)  # of all ranks' rows
        share = self._world.share(len(rows))
        mine, weights = rows[share], weights[share]
        parts = self.engine.micro_batches()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        for part in parts:
            batch = experience.batch(mine[part], self._inputs.encoder.pad_id, device)
            inputs = Slice.of(experience, targets, weights[part], mine[part], batch.width, device)
            logprobs, values, entropies = self.engine(batch, self._params.temperature)
            if measured is not None:
                measured.add(mine[part], logprobs, values, entropies)
                inputs = replace(inputs, old=logprobs.detach())
            losses = objective(logprobs, values, inputs)
            # The engine averages over ranks and passes; the losses are already shares of a global mean.
            self.engine.backward(losses.total * (self._world.size * len(parts)))
            sums += losses.sums
        return sums

    def _collector(self) -> Collector:
        scorer = load_reward_model(self._inputs.reward_model.path, self._world.device, self._inputs.encoder)

        @contextmanager
        def sampler() -> Iterator[Generator]:
            with self.sampling_lm() as lm:
                yield self.generator(lm)

        return Collector(
            world=self._world,
            encoder=self._inputs.encoder,
            forward=None if self._one_pass else self.engine.forward,
            rows_per_pass=self._rows_per_pass(),
            sampler=sampler,
            reference=self.reference,
            scorer=scorer,
            params=self._params,
            std_penalty=self._training.reward_std_penalty,
            seed=self._training.seed,
            samples=self._training.samples_per_prompt,
            violates=None if self._filter is None else self._filter.violates,
        )

    def _rows_per_pass(self) -> int:
        """Of the passes that look at a rollout. Learning in one pass, the reference must see the very batches that are
        learnt from, so that an unchanged policy's KL is 0 to the last bit. Otherwise passes without gradients may be
        as large as those with them would be if nobody had asked for less."""
        if self._one_pass:
            return self.engine.micro_rows
        own = self._training.prompts_per_step * self._training.samples_per_prompt // self._world.size
        return micro_rows(self._training.model_copy(update={"micro_batch_size": None}), own)

    def _kl_state(self) -> dict[str, float]:
        return {"coefficient": self.controller.coefficient}

    def _take_kl(self, state: dict[str, Any]) -> None:
        self.controller.coefficient = float(state["coefficient"])


def _mini_batches(rows: Tensor, count: int, prompts: int, order: np.random.Generator) -> Tensor:
    """(count, rows / count): the rows, which lie prompt by prompt, with the prompts shuffled.

    The samples of a prompt stay together, so that a forward pass computes the prompt once; a single mini batch keeps
    the order of the rollout.
    """
    if count > 1:
        rows = rows.reshape(prompts, -1)[torch.from_numpy(order.permutation(prompts))]
    return rows.reshape(count, -1)


def _module(lm: Any, training: PolicyTraining) -> nn.Module:
    if training.algorithm is not Algorithm.PPO:
        return Actor(lm)
    return SeparateCritic(lm) if training.ppo.critic is Critic.SEPARATE else SharedCritic(lm)


def _controller(training: PolicyTraining) -> AdaptiveKL | FixedKL:
    kl = training.kl
    if kl.controller is KLController.ADAPTIVE:
        return AdaptiveKL(kl.coefficient, kl.target, kl.horizon)
    return FixedKL(kl.coefficient)
