"""Every field of a policy's training, by its dotted name on the wire, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_trainer.config import TRAINING_READ_BY, Algorithm, PolicyTraining, Spec

IN_LOSS = {"placement": "loss", "estimator": "k3"}  # neither is allowed without the other
# A value that is not the default, for each field that not every algorithm reads.
OTHER: dict[str, Any] = {
    "samplesPerPrompt": 3,
    "missingEosPenalty": 0.0,
    "overlong": {"start": 5},
    "rewardStdPenalty": 1,
    "lossNormalization": "sequence",
    "kl.placement": IN_LOSS,
    "kl.estimator": IN_LOSS,
    "kl.coefficient": 0.0,
    "kl.controller": "fixed",
    "kl.target": 1.0,
    "kl.horizon": 100,
    "generation.engine": "vllm",
    "ppo.clip": 0.3,
    "ppo.clipHigh": 0.3,
    "ppo.dualClip": 3.0,
    "ppo.targetKl": 0.1,
    "ppo.epochs": 1,
    "ppo.miniBatches": 4,
    "ppo.whitenAdvantages": False,
    "ppo.whitenRewards": True,
    "ppo.critic": "separate",
    "ppo.criticWarmupSteps": 1,
    "ppo.valueClip": 0.3,
    "ppo.valueCoefficient": 1,
    "ppo.gamma": 0.99,
    "ppo.gaeLambda": 1,
    "grpo.scale": "none",
    "dpo.loss": "ipo",
    "dpo.beta": 1,
    "dpo.labelSmoothing": 0.1,
    "kto.beta": 1,
    "kto.desirableWeight": 2,
    "kto.undesirableWeight": 2,
    "distillation.mode": "sequence",
    "distillation.divergence": "reverse",
    "distillation.onPolicyFraction": 1,
    "distillation.beta": {"divergence": "jensenShannon", "beta": 0.9},  # it does nothing beside another
    "constraints": [{"cost": "length", "limit": 5}],
}


def set_to_other(field: str) -> dict[str, Any]:
    """``training`` with this field set and nothing else."""
    block, _, name = field.partition(".")
    if not name:
        return {block: OTHER[field]}
    return {block: OTHER[field] if isinstance(OTHER[field], dict) else {name: OTHER[field]}}


def _fields(model: type[Spec], prefix: str = "") -> Iterator[tuple[str, tuple[type[Spec], str]]]:
    for name, field in model.model_fields.items():
        inner, path = field.annotation, f"{prefix}{field.alias or name}"
        if isinstance(inner, type) and issubclass(inner, Spec):
            yield from _fields(inner, f"{path}.")
        else:
            yield path, (model, name)


# Path on the wire → the model that holds the field and its name there. What a block has that is always there stands for
# itself; optional blocks and lists are one field.
FIELDS = dict(_fields(PolicyTraining))


def entry_of(field: str) -> str | None:
    """The field's entry in the table: its own or that of its block; None: everybody reads it."""
    return next((name for name in (field, field.partition(".")[0]) if name in TRAINING_READ_BY), None)


def readers_of(field: str) -> frozenset[Algorithm]:
    entry = entry_of(field)
    return frozenset(Algorithm) if entry is None else TRAINING_READ_BY[entry]
