"""The work of a step and nothing else: no session, no metrics, no DeepSpeed, rows encoded beforehand.

Generate, score, forward, backward, AdamW: the same kernels on the same rows as the loops, straight one after another.
What the loops take beyond this is their overhead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.trl_peers.pipe import Stepper
from benchmarks.trl_peers.world import SAMPLES, SIZES, endless, limit
from rlhf_trainer.algos.advantages import group_relative, leave_one_out
from rlhf_trainer.algos.bradley_terry import preference_loss
from rlhf_trainer.algos.kl import k3_loss
from rlhf_trainer.algos.normalization import per_sequence, per_token
from rlhf_trainer.algos.ppo import Clip, policy_loss, value_loss
from rlhf_trainer.algos.preference import dpo_losses, margins
from rlhf_trainer.allocator import keep_freed_memory
from rlhf_trainer.generate.base import Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.models.critic import SeparateCritic
from rlhf_trainer.models.policy import Batch, load_policy, reference_logprobs, score_tokens
from rlhf_trainer.models.reward import RewardMember, load_reward_model, to_batch

CPU = torch.device("cpu")
Work = Callable[[], torch.Tensor]  # everything of a step up to its loss


def main(world: Path, algorithm: str, size_name: str, lengths: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = SIZES[size_name].rows
    module, work = _WORK[algorithm](world, rows, lengths)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    stepper = Stepper()
    while True:
        torch.autograd.backward(work())
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stepper.ended(0.0)


def _reward(world: Path, rows: int, lengths: str) -> tuple[nn.Module, Work]:
    _, encoder = load_policy(world / "policy")
    member = RewardMember.from_base(world / "policy", encoder.pad_id, torch.Generator().manual_seed(0))
    pairs = [
        [encoder.pair(row["prompt"], row[key]) for key in _BOTH] for row in _read(world / f"pairs-{lengths}.jsonl")
    ]
    batches = cycle([pairs[start : start + rows] for start in range(0, len(pairs) - rows + 1, rows)])
    first = torch.ones(rows)

    def work() -> torch.Tensor:
        chosen = next(batches)
        a, b = member(*to_batch([pair[0] for pair in chosen] + [pair[1] for pair in chosen], encoder.pad_id)).chunk(2)
        return preference_loss(a[:, 0], b[:, 0], first, 0.01)

    return member, work


def _dpo(world: Path, rows: int, lengths: str) -> tuple[nn.Module, Work]:
    lm, encoder = load_policy(world / "policy")
    found = _read(world / f"pairs-{lengths}.jsonl")
    prompts = [encoder.prompt(row["prompt"]) for row in found]
    replies = [[encoder.response(row[key]) for key in _BOTH] for row in found]
    parts = [slice(start, start + rows) for start in range(0, len(found) - rows + 1, rows)]
    batches = [
        Batch.of(prompts[part] * 2, [r[0] for r in replies[part]] + [r[1] for r in replies[part]], encoder.pad_id, CPU)
        for part in parts
    ]
    anchored = cycle([(batch, reference_logprobs(lm, batch, 1.0).sum(dim=1).chunk(2)) for batch in batches])
    first = torch.ones(rows)

    def work() -> torch.Tensor:
        batch, anchors = next(anchored)
        chosen, rejected = score_tokens(lm, batch, 1.0).logprobs.sum(dim=1).chunk(2)
        return dpo_losses(margins(chosen, rejected, *anchors), first, beta=0.1).mean()

    return lm, work


class Rollouts:
    """Replies of the current policy, their rewards, and what the reference thinks of them."""

    def __init__(self, world: Path, rows: int, samples: int, lengths: str) -> None:
        self.lm, self.encoder = load_policy(world / "policy")
        self._reference, _ = load_policy(world / "policy")
        self._scorer = load_reward_model(world / "reward")
        texts = [row["prompt"] for row in _read(world / f"prompts-{lengths}.jsonl")]
        own = rows // samples
        self._batches = cycle([texts[start : start + own] for start in range(0, len(texts) - own + 1, own)])
        eos = -1 if endless(lengths) else self.encoder.eos_id
        self._generator = CachedGenerator(self.lm, pad_id=self.encoder.pad_id, eos_id=eos)
        self._params = SamplingParams(limit(lengths), 1.0)
        self._samples, self._step = samples, 0

    @torch.no_grad()
    def take(self) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """Batch, rewards (B,), reference log-probs (B, T)."""
        self._step += 1
        texts = [text for text in next(self._batches) for _ in range(self._samples)]
        prompts = [tuple(self.encoder.prompt(text)) for text in texts]
        requests = [Request(ids, SampleKey(0, self._step, row)) for row, ids in enumerate(prompts)]
        replies = [said.tokens for said in self._generator.generate(requests, self._params)]
        rewards, _ = self._scorer(texts, [self.encoder.decode(reply) for reply in replies])
        batch = Batch.of(prompts, replies, self.encoder.pad_id, CPU)
        return batch, rewards, reference_logprobs(self._reference, batch, 1.0)


def _grpo(world: Path, rows: int, lengths: str) -> tuple[nn.Module, Work]:
    rollouts = Rollouts(world, rows, SAMPLES, lengths)

    def work() -> torch.Tensor:
        batch, rewards, reference = rollouts.take()
        logprobs = score_tokens(rollouts.lm, batch, 1.0).logprobs
        weights, old = per_sequence(batch.lengths, batch.width), logprobs.detach()
        advantages = group_relative(rewards, SAMPLES)[:, None] * batch.mask()
        kl = (k3_loss(logprobs, reference, old) * weights).sum()
        return policy_loss(logprobs, old, advantages, weights, Clip(0.2, 0.2)).loss + 0.04 * kl

    return rollouts.lm, work


def _rloo(world: Path, rows: int, lengths: str) -> tuple[nn.Module, Work]:
    rollouts = Rollouts(world, rows, SAMPLES, lengths)

    def work() -> torch.Tensor:
        batch, rewards, reference = rollouts.take()
        logprobs = score_tokens(rollouts.lm, batch, 1.0).logprobs
        weights, old = per_token(batch.lengths, batch.width), logprobs.detach()
        worth = rewards - 0.04 * (old - reference).sum(dim=1)
        advantages = leave_one_out(worth, SAMPLES)[:, None] * batch.mask()
        return policy_loss(logprobs, old, advantages, weights, Clip(0.2, 0.2)).loss

    return rollouts.lm, work


def _ppo(world: Path, rows: int, lengths: str) -> tuple[nn.Module, Work]:
    """One pass: its values are known before what to learn from them is."""
    rollouts = Rollouts(world, rows, 1, lengths)
    module = SeparateCritic(rollouts.lm)

    def work() -> torch.Tensor:
        batch, rewards, reference = rollouts.take()
        logprobs, values, _ = module(batch, 1.0)
        old, old_values = logprobs.detach(), values.detach()
        weights, mask = per_token(batch.lengths, batch.width), batch.mask()
        returns = (rewards[:, None] - 0.04 * (old - reference)) * mask
        critic = value_loss(values, old_values, returns, weights, clip=0.2)
        return policy_loss(logprobs, old, returns - old_values, weights, Clip(0.2, 0.2)).loss + 0.5 * critic

    return module, work


_BOTH = ("response_a", "response_b")
_WORK: dict[str, Callable[[Path, int, str], tuple[nn.Module, Work]]] = {
    "Reward": _reward,
    "DPO": _dpo,
    "GRPO": _grpo,
    "RLOO": _rloo,
    "PPO": _ppo,
}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
