"""How far an estimate or a trained model is from what pen and paper give: for tests and for the table of errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_trainer.algos.bradley_terry import accuracy, preference_loss
from rlhf_trainer.algos.gae import gae
from rlhf_trainer.algos.rewards import response_mask
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.desk.model import build_tokenizer
from rlhf_trainer.distributed import World
from rlhf_trainer.engine import Engine, EngineOptions
from rlhf_trainer.models.reward import RewardEnsemble, to_batch
from tests.trainer.training_world import preference_rows, true_reward

LENGTHS = torch.tensor([5, 1, 3, 8])
WIDTH = 8


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(seed: int) -> tuple[Tensor, Tensor]:
    mask = response_mask(LENGTHS, WIDTH).double()
    return noise(seed, len(LENGTHS), WIDTH) * mask, mask


def slow_gae(rewards: Tensor, values: Tensor, length: int, gamma: float, lam: float) -> list[float]:
    """Equation 16 as it stands: the sum over all later steps of (gamma lambda)^l delta."""
    following = [*values[1:length].tolist(), 0.0]
    deltas = [float(rewards[t] + gamma * following[t] - values[t]) for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


def gae_error(gamma: float, lam: float, taken: float | None = None) -> float:
    """Largest difference of the recursion from the double sum; ``taken``: the lambda that the recursion is given."""
    (rewards, mask), (values, _) = masked(0), masked(1)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam if taken is None else taken)
    return max(
        abs(float(ours) - theirs)
        for row, length in enumerate(LENGTHS.tolist())
        for ours, theirs in zip(
            advantages[row, :length].tolist(), slow_gae(rewards[row], values[row], length, gamma, lam), strict=True
        )
    )


def recovery(base: Path, world: World, steps: int, shuffled: bool) -> tuple[float, float]:
    """Held-out accuracy and its ceiling after training a real ensemble member through the engine."""
    encoder = Encoder(build_tokenizer())
    rows = preference_rows(2400, seed=11)
    labels = torch.tensor([float(row["preference"] == "a") for row in rows])
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    a, b = ([encoder.pair(row["prompt"], row[name]) for row in rows] for name in ("response_a", "response_b"))
    ensemble = RewardEnsemble.from_base(base, 1, encoder.pad_id, seed=0)
    engine = Engine(ensemble, EngineOptions(zero_stage=0, learning_rate=0.02, rows_per_step=64), world)

    def delta(part: slice) -> torch.Tensor:
        ids, lengths = to_batch(a[part] + b[part], encoder.pad_id)
        first, second = engine(ids[None], lengths[None])[0, :, 0].chunk(2)
        return torch.as_tensor(first - second)

    for step in range(steps):
        part = slice(step % 30 * 64, step % 30 * 64 + 64)
        difference = delta(part)
        engine.backward(preference_loss(difference, torch.zeros_like(difference), labels[part]))
        engine.step()
    test = slice(1920, 2400)
    with torch.no_grad():
        right, _ = accuracy(delta(test), labels[test])
    engine.close()
    odds = [true_reward(row["response_a"]) - true_reward(row["response_b"]) for row in rows[test]]
    return right, float(np.mean([1 / (1 + math.exp(-abs(value))) for value in odds]))
