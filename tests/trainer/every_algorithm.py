"""Tiny attempts of every algorithm, the reward model's included, that differ in nothing but what a test asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer import offline_world, ppo_world, training_world
from tests.trainer.algorithms import OFFLINE, ONLINE, VARIANTS
from tests.trainer.training_world import TinyWorld

REWARD_MODEL = "reward-model"
ALGORITHMS = (REWARD_MODEL, *ONLINE, *OFFLINE, *VARIANTS)
LORA: dict[str, Any] = {"lora": {"rank": 2, "alpha": 8.0}}


def staged(algorithm: str, stage: int, **training: Any) -> tuple[str, dict[str, Any]]:
    """An algorithm at a ZeRO stage, and what else its settings are replaced with."""
    return algorithm, {"deepspeed": {"zero_stage": stage}, **training}


class EveryAlgorithm:
    """One set of inputs in ``folder`` for the attempts of all of them."""

    def __init__(self, folder: Path, tiny: TinyWorld) -> None:
        folder.mkdir(exist_ok=True)
        self._tiny = tiny
        self._offline = offline_world.make_offline_world(folder, tiny)
        self._filter = Located(path=str(ppo_world.strict_filter(folder / "filter.json")))

    def attempt(
        self, algorithm: str, output: Path, ranks: int, training: Mapping[str, Any], **fields: Any
    ) -> AttemptConfig:
        """``training`` replaces settings of ``algorithm``, ``fields`` those of the attempt; no gate is in the way."""
        if algorithm == REWARD_MODEL:
            return self._tiny.config(output, ranks, training=training_world.training_of(**training), **fields)
        if algorithm in ONLINE:
            small = {"prompts_per_step": 4, "samples_per_prompt": 2}
            online = ppo_world.training_of(**{**small, **ONLINE[algorithm], **training})
            given = {"evaluation": ppo_world.NO_GATE, "safety_filter": self._filter, "audit_reward_model": None}
            return self._offline.policy.config(output, ranks, training=online, **{**given, **fields})
        settings = {"algorithm": algorithm, **{**OFFLINE, **VARIANTS}[algorithm], **training}
        offline = offline_world.training_of(**settings)
        return self._offline.config(output, offline, ranks, **{"evaluation": ppo_world.NO_GATE, **fields})
