"""A bandit played through a real language model by the online algorithms' own targets and losses.

One token of the vocabulary is a whole reply: an arm. Every arm is played once and weighed with its probability, so
that gradients are exact and no noise blurs the ends. A constant baseline, whichever an algorithm takes, then costs
nothing, and all of them must meet at the same closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trainer.config import Cost, PolicyTraining
from rlhf_trainer.loops.constraints import Constraints
from rlhf_trainer.loops.estimators import Prices, estimate, kl_loss_coefficient
from rlhf_trainer.loops.objective import Objective, Slice
from rlhf_trainer.loops.rollout import Experience
from rlhf_trainer.models.policy import Batch, reference_logprobs, score_tokens
from tests.trainer.ppo_world import experience_of

ARMS, BETA, STEPS = 16, 0.15, 200
REPLIES = 400  # that show constraints a mean cost
PROMPT = (3, 1)
REWARDS = 2.0 * torch.rand(ARMS, generator=torch.Generator().manual_seed(1))
EVERY_ARM = Batch.of([PROMPT] * ARMS, [[arm] for arm in range(ARMS)], 0, torch.device("cpu"))
LossTerm = Callable[[Tensor, Tensor], Tensor]


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=ARMS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def log_policy(lm: LlamaForCausalLM) -> Tensor:
    """log pi of every arm [ARMS]"""
    return reference_logprobs(lm, EVERY_ARM, 1.0)[:, 0]


def training_of(**changes: Any) -> PolicyTraining:
    """All arms are the samples of one prompt; a fixed KL coefficient."""
    kl = {"controller": "fixed", "coefficient": BETA, **changes.pop("kl", {})}
    fields = {"samples_per_prompt": ARMS, "kl": kl, "generation": {"max_new_tokens": 1}, "missing_eos_penalty": 0.0}
    return PolicyTraining.model_validate({**fields, **changes})


@dataclass
class Played:
    """How a run ended. ``average`` is the mean policy of its second half."""

    policy: LlamaForCausalLM
    reference: LlamaForCausalLM
    constraints: Constraints
    average: Tensor

    def distance(self, rewards: Tensor = REWARDS, beta: float = BETA) -> float:
        """KL(pi‖pi*) with pi* ∝ pi_ref exp(rewards / beta)"""
        now = log_policy(self.policy)
        best = torch.log_softmax(log_policy(self.reference) + rewards / beta, -1)
        return float((now.exp() * (now - best)).sum())


def play(
    training: PolicyTraining,
    *,
    costs: Mapping[Cost, Tensor] | None = None,
    extra: LossTerm | None = None,
    steps: int = STEPS,
    rate: float = 0.02,
) -> Played:
    """``costs`` (ARMS,) are 0 or 1, of safety or incompleteness; ``extra`` is a term that the trainer refuses to
    offer."""
    policy, reference = language_model(), language_model().requires_grad_(False)
    anchor = reference_logprobs(reference, EVERY_ARM, 1.0)
    constraints = Constraints(training.constraints)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    average = torch.zeros(ARMS)
    for step in range(steps):
        optimizer.zero_grad()
        logprobs = score_tokens(policy, EVERY_ARM, 1.0).logprobs
        old = logprobs.detach()
        experience = experience_of(
            [[arm] for arm in range(ARMS)],
            REWARDS.tolist(),
            logprobs=old,
            reference=anchor,
            sampled=old,
            **_costly(costs or {}),
        )
        loss = _loss(training, constraints, experience, logprobs)
        torch.autograd.backward(loss if extra is None else loss + (old.exp() * extra(logprobs, anchor)).sum())
        optimizer.step()
        schedule.step()
        if constraints:
            _raise_prices(constraints, experience, old.exp()[:, 0])
        if step >= steps // 2:
            average += old.exp()[:, 0] / (steps - steps // 2)
    return Played(policy, reference, constraints, average)


def _costly(costs: Mapping[Cost, Tensor]) -> dict[str, Tensor]:
    """Fields of an experience that costs as much."""
    fields = {} if Cost.SAFETY not in costs else {"violations": costs[Cost.SAFETY]}
    return fields if Cost.INCOMPLETE not in costs else {**fields, "finished": costs[Cost.INCOMPLETE] == 0}


def _loss(training: PolicyTraining, constraints: Constraints, experience: Experience, logprobs: Tensor) -> Tensor:
    prices = Prices(training.kl.coefficient, constraints.multipliers)
    targets = estimate(experience, training, prices)
    rows = targets.rows.tolist()
    old = experience.logprobs
    part = Slice.of(experience, targets, old.exp()[rows], rows, 1, old.device)
    objective = Objective(training, kl_loss_coefficient(training, prices))
    return objective(logprobs[rows], torch.zeros_like(logprobs[rows]), part).total


def _raise_prices(constraints: Constraints, experience: Experience, policy: Tensor) -> None:
    """Dual ascent on mean costs: replies that all violate by the mean, and of which its share is incomplete."""
    violations, incomplete = (policy @ cost.float() for cost in (experience.violations, ~experience.finished))
    finished = (torch.arange(REPLIES) + 0.5) / REPLIES > incomplete
    shown = experience_of([[0]] * REPLIES, [0.0] * REPLIES, violations=violations.expand(REPLIES), finished=finished)
    constraints.update(shown)
