"""Candidate pairs: two replies of one policy to each prompt, and how much the reward members differ about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.generate.base import Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.models.reward import RewardScorer, to_batch
from rlhf_trainer.randomness import Stream

_ROWS_PER_PASS = 256


@dataclass(frozen=True)
class Candidate:
    prompt: str
    response_a: str
    response_b: str


def sample_pairs(
    lm: Any, encoder: Encoder, prompts: Sequence[str], params: SamplingParams, seed: int
) -> list[Candidate]:
    """One candidate for each prompt whose two replies differ and both say something; a function of (weights, seed)."""
    return pair_up(prompts, *(replies(lm, encoder, prompts, params, seed, side) for side in (0, 1)))


def replies(
    lm: Any, encoder: Encoder, prompts: Sequence[str], params: SamplingParams, seed: int, side: int
) -> list[str]:
    """One reply to each prompt; the two sides draw independently."""
    sampler = CachedGenerator(lm, pad_id=encoder.pad_id, eos_id=encoder.eos_id)
    requests = [
        Request(tuple(encoder.prompt(text)), SampleKey(seed, side, row, Stream.COLLECTION))
        for row, text in enumerate(prompts)
    ]
    return [encoder.decode(done.tokens).strip() for done in sampler.generate(requests, params)]


def pair_up(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Candidate]:
    pairs = zip(prompts, first, second, strict=True)
    return [Candidate(prompt, a, b) for prompt, a, b in pairs if a and b and a.split() != b.split()]


@torch.no_grad()
def disagreement(scorer: RewardScorer, candidates: Sequence[Candidate]) -> list[float]:
    """Standard deviation over the ensemble's members of r(a) - r(b), per candidate: what members share cancels."""
    a = member_rewards(scorer, [scorer.encoder.pair(each.prompt, each.response_a) for each in candidates])
    b = member_rewards(scorer, [scorer.encoder.pair(each.prompt, each.response_b) for each in candidates])
    spread: Tensor = (a - b).std(dim=0, unbiased=False)
    return [float(value) for value in spread]


def member_rewards(scorer: RewardScorer, rows: Sequence[Sequence[int]]) -> Tensor:
    """[K, B] calibrated reward of every member, on the CPU."""
    members = len(scorer.ensemble.members)
    device = next(scorer.ensemble.parameters()).device
    parts = []
    for start in range(0, len(rows), _ROWS_PER_PASS):
        ids, lengths = to_batch(rows[start : start + _ROWS_PER_PASS], scorer.encoder.pad_id)
        raw = scorer.ensemble(*(each.to(device).expand(members, *each.shape) for each in (ids, lengths)))
        parts.append(raw[..., 0].float().cpu())
    offsets = torch.tensor(scorer.calibration.offsets)[:, None]
    return (torch.cat(parts, dim=1) - offsets) / scorer.calibration.temperature
