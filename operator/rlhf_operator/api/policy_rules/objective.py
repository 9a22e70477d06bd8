"""What is optimised: the KL penalty, the clipped surrogate, constraints, the divergence from a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_operator.api.policy_rules.rule import Rule
from rlhf_trainer.config import (
    Constraint,
    Cost,
    DistillationMode,
    Divergence,
    KLEstimator,
    KLPlacement,
)

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec


def _upper_clip(spec: PolicyOptimizationJobSpec) -> float:
    ppo = spec.training.ppo
    return ppo.clip if ppo.clip_high is None else ppo.clip_high


def _reachable(constraint: Constraint) -> bool:
    return constraint.limit > 0.0 if constraint.cost is Cost.LENGTH else constraint.limit < 1.0


_EACH_CONSTRAINT = "!has(self.training.constraints) || self.training.constraints.all(c, {})"
_PPO = "self.training.ppo"
_UPPER = f"(has({_PPO}.clipHigh) ? {_PPO}.clipHigh : {_PPO}.clip)"

POLICY_GRADIENT = (
    Rule(
        "(self.training.kl.placement == 'reward') == (self.training.kl.estimator == 'k1')",
        lambda spec: (
            (spec.training.kl.placement is KLPlacement.REWARD) == (spec.training.kl.estimator is KLEstimator.K1)
        ),
        "training.kl: only k1 has the right gradient in the reward, only k2 and k3 in the loss: "
        "set estimator k1 with placement reward, k2 or k3 with placement loss",
        ".training.kl",
    ),
    Rule(
        f"!has({_PPO}.clipHigh) || {_PPO}.clipHigh >= {_PPO}.clip",
        lambda spec: _upper_clip(spec) >= spec.training.ppo.clip,
        "training.ppo.clipHigh widens the clip range upwards: set it to clip or more, or remove it",
        ".training.ppo.clipHigh",
    ),
    Rule(
        f"!has({_PPO}.dualClip) || {_PPO}.dualClip > 1.0 + {_UPPER}",
        lambda spec: spec.training.ppo.dual_clip is None or spec.training.ppo.dual_clip > 1.0 + _upper_clip(spec),
        "training.ppo.dualClip bounds ratios beyond the clip range: set it above 1 + clipHigh (or clip), "
        "3 is usual, or remove it",
        ".training.ppo.dualClip",
    ),
)

CONSTRAINTS = (
    Rule(
        _EACH_CONSTRAINT.format("self.training.constraints.exists_one(d, d.cost == c.cost)"),
        lambda spec: len({c.cost for c in spec.training.constraints}) == len(spec.training.constraints),
        "training.constraints name a cost twice: keep one of them",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.cost != 'safety' || has(self.evaluation.safetyFilter)"),
        lambda spec: (
            spec.evaluation.safety_filter is not None
            or all(constraint.cost is not Cost.SAFETY for constraint in spec.training.constraints)
        ),
        "a constraint on safety is measured by evaluation.safetyFilter: name one",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.cost == 'length' ? c.limit > 0.0 : c.limit < 1.0"),
        lambda spec: all(_reachable(constraint) for constraint in spec.training.constraints),
        "a limit on length must be above 0 (tokens), one on safety or incomplete below 1 (a share of the responses)",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.initialMultiplier <= c.maxMultiplier"),
        lambda spec: all(c.initial_multiplier <= c.max_multiplier for c in spec.training.constraints),
        "a constraint's initialMultiplier must not exceed its maxMultiplier: lower it, or raise maxMultiplier",
        ".training.constraints",
    ),
)

DISTILLATION = (
    Rule(
        "self.training.distillation.mode != 'sequence' || self.training.distillation.divergence == 'forward'",
        lambda spec: (
            spec.training.distillation.mode is not DistillationMode.SEQUENCE
            or spec.training.distillation.divergence is Divergence.FORWARD
        ),
        "training.distillation: learning the teacher's samples (mode sequence) is the forward divergence: "
        "remove divergence, or set mode onPolicy",
        ".training.distillation",
    ),
)
