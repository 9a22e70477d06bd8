"""Proximal policy optimisation against a reward model.

One engine holds policy and value head; reference and reward model are frozen. Everything a step uses is a function
of (seed, step) and the weights, so a checkpoint is the engine, the KL controller and one number.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_trainer.algos.advantages import Moments, whiten
from rlhf_trainer.algos.gae import gae
from rlhf_trainer.algos.kl import AdaptiveKL, FixedKL
from rlhf_trainer.algos.ppo import policy_loss, value_loss
from rlhf_trainer.algos.rewards import response_mask, token_rewards
from rlhf_trainer.checkpoint import Component
from rlhf_trainer.components import JsonState
from rlhf_trainer.config import KLController, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.data.sampler import Position, Sampler
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.generate.base import SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.rollout import Collector, Experience, current_weights
from rlhf_trainer.models.policy import ActorCritic, load_policy
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.randomness import Stream, generator

_TOKENS_PER_PASS = 32_768  # of one rank: bounds the activations of a backward pass


@dataclass(frozen=True)
class Targets:
    """What the mini batches of one step learn from: (B, T) tensors of the whole batch."""

    advantages: Tensor
    returns: Tensor
    mask: Tensor


class PPOTrainer:
    """Engine, reference, reward model and KL controller of one run."""

    def __init__(self, session: Session, inputs: PolicyInputs) -> None:
        self._session, self._inputs = session, inputs
        self._world, self._training = session.world, inputs.training
        lm, _ = load_policy(inputs.policy.path)
        self.reference = copy.deepcopy(lm).requires_grad_(False).to(self._world.device)
        sharded = self._training.deepspeed.zero_stage == 3
        self._replica = copy.deepcopy(self.reference) if sharded else None
        self.engine = Engine(ActorCritic(lm), self._engine_options(), self._world)
        self.engine.module.eval()  # dropout off: the ratio of an unchanged policy must be 1
        kl = self._training.kl
        self.controller = (
            AdaptiveKL(kl.coefficient, kl.target, kl.horizon)
            if kl.controller is KLController.ADAPTIVE
            else FixedKL(kl.coefficient)
        )
        self._params = SamplingParams(self._training.generation.max_new_tokens, self._training.generation.temperature)

    def sampling_lm(self) -> Any:
        """Context manager: the current policy's language model with whole weights. Collective."""
        return current_weights(self.engine, self._replica)

    def generator(self, lm: Any) -> CachedGenerator:
        encoder: Encoder = self._inputs.encoder
        return CachedGenerator(lm, pad_id=encoder.pad_id, eos_id=encoder.eos_id)

    def train(self, after_step: Callable[[int], None]) -> None:
        """All remaining steps of the run; ``after_step(done)`` after each."""
        session, training = self._session, self._training
        components: dict[str, Component] = {
            "engine": self.engine,
            "klController": JsonState(self._world, self._kl_state, self._take_kl),
        }
        done = session.begin(components, training.steps)
        size = len(self._inputs.training_prompts)
        sampler = Sampler(size, Position.after(done * training.prompts_per_step, size, training.seed), Stream.PROMPTS)
        collector = self._collector()
        for step in range(done, training.steps):
            prompts = [self._inputs.training_prompts[row] for row in sampler.take(training.prompts_per_step)]
            experience = collector.collect(step, prompts)
            session.finish_step(step + 1, self._learn(step, experience))
            after_step(step + 1)

    def _learn(self, step: int, experience: Experience) -> dict[str, float]:
        began = time.monotonic()
        training, coefficient = self._training, self.controller.coefficient
        targets = make_targets(experience, training, coefficient)
        rate = training.learning_rate * (training.steps - step) / training.steps
        sums: dict[str, float] = {}
        for epoch in range(training.ppo.epochs):
            order = generator(training.seed, Stream.MINI_BATCHES, step, epoch).permutation(training.prompts_per_step)
            for rows in order.reshape(training.ppo.mini_batches, -1):
                for name, value in self._mini_batch(rows.tolist(), experience, targets).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.engine.step(rate)
        kl = float(experience.kl.sum(dim=1).mean())
        self.controller.update(kl, training.prompts_per_step)
        seconds = self._world.means({"trainSeconds": time.monotonic() - began})
        figures = _figures(experience, targets) | _loss_figures(self._world.sums(sums), training) | seconds
        total = experience.generate_seconds + experience.score_seconds + seconds["trainSeconds"]
        figures |= {"klCoefficient": coefficient, "learningRate": rate, "kl": kl}
        figures |= {"samplesPerSecond": training.prompts_per_step / total}
        norm = self.engine.gradient_norm
        return figures | ({"gradientNorm": norm} if math.isfinite(norm) else {})

    def _mini_batch(self, rows: Sequence[int], experience: Experience, targets: Targets) -> dict[str, float]:
        """Gradient of one mini batch; returns this rank's sums over its tokens."""
        ppo, device = self._training.ppo, self._world.device
        tokens = float(targets.mask[list(rows)].sum())  # of all ranks: every token weighs the same everywhere
        mine = rows[self._world.share(len(rows))]
        parts = self.engine.micro_batches()
        sums = {"policyLoss": 0.0, "valueLoss": 0.0, "clipFraction": 0.0, "approxKl": 0.0, "tokens": 0.0}
        for part in parts:
            chosen = list(mine[part])
            batch = experience.batch(chosen, self._inputs.encoder.pad_id, device)
            width = batch.width
            old, before, advantages, returns, mask = (
                values[chosen, :width].to(device)
                for values in (
                    experience.logprobs,
                    experience.values,
                    targets.advantages,
                    targets.returns,
                    targets.mask,
                )
            )
            logprobs, values, _ = self.engine(batch, self._params.temperature)
            surrogate = policy_loss(logprobs, old, advantages, mask, clip=ppo.clip, tokens=tokens)
            critic = value_loss(values, before, returns, mask, clip=ppo.value_clip, tokens=tokens)
            # The engine averages over ranks and passes; the losses are already shares of a global mean.
            shares = self._world.size * len(parts)
            self.engine.backward((surrogate.loss + ppo.value_coefficient * critic) * shares)
            sums["policyLoss"] += float(surrogate.loss.detach())
            sums["valueLoss"] += float(critic.detach())
            sums["clipFraction"] += float(surrogate.clipped_tokens)
            sums["approxKl"] += float(surrogate.approx_kl_sum)
            sums["tokens"] += float(mask.sum())
        return sums

    def _collector(self) -> Collector:
        scorer = load_reward_model(self._inputs.reward_model.path, self._world.device, self._inputs.encoder)

        def sampler() -> CachedGenerator:
            with self.sampling_lm() as lm:
                return self.generator(lm)

        return Collector(
            world=self._world,
            encoder=self._inputs.encoder,
            forward=self.engine.forward,
            sampler=sampler,
            reference=self.reference,
            scorer=scorer,
            params=self._params,
            std_penalty=self._training.reward_std_penalty,
            seed=self._training.seed,
        )

    def _engine_options(self) -> EngineOptions:
        training = self._training
        rows = training.prompts_per_step // training.ppo.mini_batches
        own = rows // self._world.size
        longest = training.max_prompt_length + training.generation.max_new_tokens
        fitting = (part for part in range(own, 0, -1) if own % part == 0 and part * longest <= _TOKENS_PER_PASS)
        return EngineOptions(
            zero_stage=training.deepspeed.zero_stage,
            learning_rate=training.learning_rate,
            rows_per_step=rows,
            micro_rows=next(fitting, 1),
            max_grad_norm=1.0,
        )

    def _kl_state(self) -> dict[str, float]:
        return {"coefficient": self.controller.coefficient}

    def _take_kl(self, state: dict[str, Any]) -> None:
        self.controller.coefficient = float(state["coefficient"])


def make_targets(experience: Experience, training: PolicyTraining, kl_coefficient: float) -> Targets:
    """Token rewards, GAE, whitened advantages and returns of a whole batch."""
    mask = response_mask(experience.lengths, experience.logprobs.shape[1])
    rewards = token_rewards(
        experience.scores,
        experience.kl,
        experience.lengths,
        experience.finished,
        kl_coefficient=kl_coefficient,
        missing_eos_penalty=training.missing_eos_penalty,
    )
    raw, returns = gae(rewards, experience.values, mask, gamma=training.ppo.gamma, lam=training.ppo.gae_lambda)
    return Targets(whiten(raw, mask, Moments.of(raw, mask)), returns, mask)


def _figures(experience: Experience, targets: Targets) -> dict[str, float]:
    """Metrics of the sampled batch; equal on all ranks, since all hold all of it."""
    tokens = targets.mask.sum()
    returns = Moments.of(targets.returns, targets.mask)
    residual = Moments.of(targets.returns - experience.values, targets.mask)
    return {
        "reward": float(experience.scores.mean()),
        "rewardStd": float(experience.scores.std()) if len(experience.scores) > 1 else 0.0,
        "ensembleStd": float(experience.spreads.mean()),
        "entropy": float(experience.entropies.sum() / tokens),
        "responseLength": float(experience.lengths.float().mean()),
        "clippedFraction": float((~experience.finished).float().mean()),
        "explainedVariance": 1.0 - residual.variance / returns.variance if returns.variance > 0 else 0.0,
        "samplerGap": experience.sampler_gap,
        "generateSeconds": experience.generate_seconds,
        "scoreSeconds": experience.score_seconds,
    }


def _loss_figures(sums: dict[str, float], training: PolicyTraining) -> dict[str, float]:
    updates = training.ppo.epochs * training.ppo.mini_batches
    policy, value = sums["policyLoss"] / updates, sums["valueLoss"] / updates
    return {
        "loss": policy + training.ppo.value_coefficient * value,
        "policyLoss": policy,
        "valueLoss": value,
        "clipFraction": sums["clipFraction"] / sums["tokens"],
        "approxKl": sums["approxKl"] / sums["tokens"],
    }
