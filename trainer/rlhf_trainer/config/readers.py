"""Which algorithms read what. An input or a field that ``training.algorithm`` would ignore is refused: whoever names it
believes that it acts. API server, operator and trainer refuse by these tables."""

from __future__ import annotations

from functools import reduce
from typing import Any

from pydantic.alias_generators import to_snake

from rlhf_trainer.config.policy import FROM_PREFERENCES, ONLINE, Algorithm, PolicyTraining

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


def _value(training: PolicyTraining, field: str) -> Any:
    """Of a field by its dotted name on the wire."""
    return reduce(getattr, map(to_snake, field.split(".")), training)


def is_ignored(training: PolicyTraining, field: str) -> bool:
    """Whether this field of the table was set for nothing; the API server sets defaults for everybody."""
    unread = training.algorithm not in TRAINING_READ_BY[field]
    return unread and _value(training, field) != _value(_DEFAULTS, field)
