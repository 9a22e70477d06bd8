"""Does what a rank must hold fit, before any weight is loaded: models by their headers, activations left out.

A lower bound, so that what it refuses cannot run: state of the optimiser by ZeRO stage (Rajbhandari et al. 2020,
table 1), frozen copies as ``models/whole.py`` makes them, and the models that judge or teach.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_trainer.cgroup import memory_limit
from rlhf_trainer.config import Algorithm, Critic, PolicyTraining, Precision, RewardModelTraining
from rlhf_trainer.engine import compute_dtype
from rlhf_trainer.exits import Invalid
from rlhf_trainer.preflight_models import parameters_in
from rlhf_trainer.wire import AttemptConfig

log = logging.getLogger(__name__)

_HOPELESS = 1.2  # times the limit: a margin that no estimate is wrong by
_FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class Part:
    what: str
    size: int  # bytes


@dataclass(frozen=True)
class Place:
    """Where a rank's state has to fit."""

    what: str
    size: int  # bytes


def check_memory(config: AttemptConfig, place: Place | None = None) -> None:
    """Refuses a state that cannot fit; warns of one that leaves nothing for activations."""
    place = place or a_ranks_place()
    if place is None:
        return
    parts = held_by_a_rank(config)
    needed = sum(part.size for part in parts)
    if needed <= place.size:
        return
    shown = ", ".join(f"{part.what} {_in_words(part.size)}" for part in parts)
    message = (
        f"a rank needs about {_in_words(needed)} ({shown}), {place.what} has {_in_words(place.size)}; raise "
        "deepspeed.zeroStage, the number of ranks or the memory, or train adapters (training.lora)"
    )
    if needed > place.size * _HOPELESS:
        raise Invalid(message, reason="OutOfMemory")
    log.warning("%s", message)


def a_ranks_place() -> Place | None:
    """A rank's GPU, or its share of the container; None where nothing limits it."""
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        return Place("its GPU", int(torch.cuda.get_device_properties(device).total_memory))
    limit, ranks = memory_limit(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if limit is None:
        return None
    return Place("the container" if ranks == 1 else f"its share of the container's {_in_words(limit)}", limit // ranks)


def held_by_a_rank(config: AttemptConfig) -> list[Part]:
    """Largest first; a model without safetensors counts nothing."""
    reward, policy = config.reward_model_training, config.policy_training
    parts: list[Part] = []
    if reward is not None and config.base_model is not None:
        parts = _of_reward_model(parameters_in(Path(config.base_model.path)), reward, config.world_size)
    elif policy is not None and config.policy is not None:
        parts = _of_policy(parameters_in(Path(config.policy.path)), policy, config.world_size)
        parts += [Part(what, _FULL * parameters) for what, parameters in _beside(config).items()]
    return sorted((part for part in parts if part.size), key=lambda part: -part.size)


def _of_reward_model(parameters: int, training: RewardModelTraining, ranks: int) -> list[Part]:
    stage, members = training.deepspeed.zero_stage, training.ensemble.members
    if training.lora is not None:
        return [_frozen(parameters * members, training.precision, ranks if stage == 3 else 1)]
    return [_trained(parameters * members, training.precision, stage, ranks)]


def _of_policy(parameters: int, training: PolicyTraining, ranks: int) -> list[Part]:
    stage, precision = training.deepspeed.zero_stage, training.precision
    own_critic = training.algorithm is Algorithm.PPO and training.ppo.critic is Critic.SEPARATE
    whole = _bytes_of(precision) * parameters
    if training.lora is None:
        state = _trained(parameters * (1 + own_critic), precision, stage, ranks)
        return [state, Part("the reference", whole), Part("the replica that samples", whole * (stage == 3))]
    base = _frozen(parameters * (1 + own_critic), precision, ranks if stage == 3 else 1)
    return [base, Part("the replica that samples", whole * (stage == 3))]


def _trained(parameters: int, precision: Precision, stage: int, ranks: int) -> Part:
    return Part("weights, gradients and optimiser", training_bytes(parameters, stage, ranks, _bytes_of(precision)))


def _frozen(parameters: int, precision: Precision, shares: int) -> Part:
    """Under adapters, whose own state is small."""
    return Part("weights", _bytes_of(precision) * parameters // shares)


def training_bytes(parameters: int, zero_stage: int, ranks: int, width: int = _FULL) -> int:
    """Bytes per rank for AdamW, activations excluded: ``width`` for weights (sharded from stage 3) and as much for
    gradients (from stage 2), 8 for moments and, beside narrower weights, 4 for those in float32 (from stage 1)."""
    shares = [ranks if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer = 8 + (_FULL if width < _FULL else 0)
    return sum(parameters * size // share for size, share in zip((width, width, optimizer), shares, strict=True))


def _beside(config: AttemptConfig) -> Mapping[str, int]:
    """Parameters of what is held in float32 beside the policy while it trains."""
    located = {"the reward model": config.reward_model, "the teacher": config.teacher}
    return {
        what: sum(parameters_in(folder) for folder in (Path(at.path), *Path(at.path).glob("members/*")))
        for what, at in located.items()
        if at is not None
    }


def _bytes_of(precision: Precision) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.empty((), dtype=compute_dtype(precision, device)).element_size()


def _in_words(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.3g} MiB"
