"""Which algorithms read what. An input or a field that ``training.algorithm``, or another field, makes idle is refused:
whoever names it believes that it acts. API server, operator and trainer refuse by these tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pydantic.alias_generators import to_snake

from rlhf_trainer.config.offline import DistillationMode, Divergence
from rlhf_trainer.config.policy import FROM_PREFERENCES, ONLINE, Algorithm, KLController, PolicyTraining

# What each input is learnt from by.
READ_BY = {
    "rewardModel": ONLINE,
    "preferences": FROM_PREFERENCES,
    "demonstrations": frozenset({Algorithm.SFT}),
    "teacher": frozenset({Algorithm.DISTILLATION}),
}

# BestOfN imitates: it has no ratio to clip, and multipliers would only reorder its samples.
_POLICY_GRADIENT = ONLINE - {Algorithm.BEST_OF_N}
_BY_TOKEN = frozenset({Algorithm.PPO, Algorithm.REINFORCE_PLUS_PLUS})  # the others reward a reply as one action
_PPO = frozenset({Algorithm.PPO})
# Fields of ``training``, or whole blocks, as on the wire. What is not named here is read whatever trains.
TRAINING_READ_BY: dict[str, frozenset[Algorithm]] = {
    "samplesPerPrompt": ONLINE | {Algorithm.DISTILLATION},
    "missingEosPenalty": ONLINE,
    "overlong": ONLINE,
    "rewardStdPenalty": ONLINE,
    "lossNormalization": ONLINE,
    "kl": ONLINE,
    "generation.engine": ONLINE,
    "ppo.clip": _POLICY_GRADIENT,
    "ppo.clipHigh": _POLICY_GRADIENT,
    "ppo.dualClip": _POLICY_GRADIENT,
    "ppo.targetKl": ONLINE,
    "ppo.epochs": ONLINE,
    "ppo.miniBatches": ONLINE,
    "ppo.whitenAdvantages": _BY_TOKEN,
    "ppo.whitenRewards": ONLINE,
    "ppo.critic": _PPO,
    "ppo.criticWarmupSteps": _PPO,
    "ppo.valueClip": _PPO,
    "ppo.valueCoefficient": _PPO,
    "ppo.gamma": _BY_TOKEN,
    "ppo.gaeLambda": _PPO,
    "grpo": frozenset({Algorithm.GRPO}),
    "dpo": frozenset({Algorithm.DPO}),
    "kto": frozenset({Algorithm.KTO}),
    "distillation": frozenset({Algorithm.DISTILLATION}),
    "constraints": _POLICY_GRADIENT,
}
_DEFAULTS = PolicyTraining()


@dataclass(frozen=True)
class Condition:
    """A field of ``training`` that does nothing unless others are set so: in words, in CEL and in Python."""

    field: str
    says: str
    cel: str
    holds: Callable[[PolicyTraining], bool]


_ADAPTIVE = (  # the controller multiplies: from 0 it never comes away
    "training.kl.controller is adaptive and training.kl.coefficient is above 0",
    "self.training.kl.controller == 'adaptive' && self.training.kl.coefficient > 0.0",
    lambda training: training.kl.controller is KLController.ADAPTIVE and training.kl.coefficient > 0,
)
_ON_POLICY = (
    "training.distillation.mode is onPolicy",
    "self.training.distillation.mode == 'onPolicy'",
    lambda training: training.distillation.mode is DistillationMode.ON_POLICY,
)
ACTS_WHEN = (
    Condition("kl.target", *_ADAPTIVE),
    Condition("kl.horizon", *_ADAPTIVE),
    Condition(
        "ppo.targetKl",
        "training.ppo.epochs is 2 or more",
        "self.training.ppo.epochs >= 2",
        lambda training: training.ppo.epochs >= 2,
    ),
    Condition(
        "distillation.beta",
        "training.distillation.divergence is jensenShannon",
        "self.training.distillation.divergence == 'jensenShannon'",
        lambda training: training.distillation.divergence is Divergence.JENSEN_SHANNON,
    ),
    Condition("distillation.divergence", *_ON_POLICY),
    Condition("distillation.onPolicyFraction", *_ON_POLICY),
)


def _value(training: PolicyTraining, field: str) -> Any:
    """Of a field by its dotted name on the wire."""
    return reduce(getattr, map(to_snake, field.split(".")), training)


def is_ignored(training: PolicyTraining, field: str) -> bool:
    """Whether this field of the table was set for nothing."""
    return training.algorithm not in TRAINING_READ_BY[field] and is_set(training, field)


def is_set(training: PolicyTraining, field: str) -> bool:
    """Whether it differs from its default: the API server sets defaults for everybody."""
    return bool(_value(training, field) != _value(_DEFAULTS, field))
