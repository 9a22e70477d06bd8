"""Every algorithm of policy optimisation once, with the options that make its state richest."""

from __future__ import annotations

from typing import Any

LOSS = {"placement": "loss", "estimator": "k3", "coefficient": 0.1, "target": 0.15, "horizon": 50}
LENGTH = {"cost": "length", "limit": 3.0, "window": 16, "learning_rate": 0.05}
SAFETY = {"cost": "safety", "limit": 0.0, "initial_multiplier": 0.9, "max_multiplier": 1.0}

ONLINE: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": "PPO", "ppo": {"critic": "separate", "critic_warmup_steps": 1, "mini_batches": 2}},
    "grpo": {"algorithm": "GRPO", "kl": LOSS, "loss_normalization": "sequence"},
    "rloo": {"algorithm": "RLOO", "constraints": [LENGTH, SAFETY], "loss_normalization": "maxLength"},
    "reinforce": {"algorithm": "ReinforcePlusPlus", "ppo": {"gamma": 0.9, "mini_batches": 2}},
    "best-of-n": {"algorithm": "BestOfN", "ppo": {"mini_batches": 2}},
}
OFFLINE: dict[str, dict[str, Any]] = {
    "DPO": {"dpo": {"beta": 0.5, "label_smoothing": 0.1}},
    "KTO": {"kto": {"beta": 0.5, "undesirable_weight": 1.5}},
    "SFT": {},
    "Distillation": {"distillation": {"divergence": "jensenShannon"}, "samples_per_prompt": 2},
}
# Other losses of an algorithm, with a path through the trainer of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "IPO": {"algorithm": "DPO", "dpo": {"loss": "ipo", "beta": 0.5}},
    "sequence": {"algorithm": "Distillation", "distillation": {"mode": "sequence"}, "samples_per_prompt": 2},
}
