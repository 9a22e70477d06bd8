"""One step's experience: replies sampled, scored and gathered, so that every rank sees the whole batch.

Experience is a few numbers per token, small beside any model. Holding all of it everywhere makes whitening, mini
batches and every metric independent of how many ranks there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_trainer.algos.kl import k1
from rlhf_trainer.algos.rewards import conservative
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.distributed import World
from rlhf_trainer.generate.base import Completion, Generator, Request, SampleKey, SamplingParams
from rlhf_trainer.models.policy import Batch, reference_logprobs

# Mean |log p(sampler) - log p(trainer)| beyond which the sampler cannot be holding the trainer's weights.
STALE_SAMPLER = 0.1
_PROBE_ROWS, _PROBE_TOKENS = 4, 8


class Scorer(Protocol):
    """A reward model: mean reward and ensemble disagreement (B,) of finished responses."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Experience:
    """All ranks' rows in prompt order, the samples of a prompt side by side. Tensors are (B,) or (B, T) as in
    ``algos``."""

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    finished: Tensor  # bool (B,): ended by end of sequence
    scores: Tensor  # (B,) after the ensemble penalty
    spreads: Tensor  # (B,) ensemble disagreement
    violations: Tensor  # (B,) 1 where the safety filter refuses the reply; 0 without a filter
    logprobs: Tensor  # (B, T) of the policy that sampled, as the trainer computes them; see ``single_pass``
    sampled: Tensor  # the same as the sampler computed them
    reference: Tensor
    values: Tensor
    entropies: Tensor
    sampler_gap: float  # mean |log p(sampler) - log p(trainer)| per token
    generate_seconds: float
    score_seconds: float

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(response) for response in self.responses])

    @property
    def kl(self) -> Tensor:
        return k1(self.logprobs, self.reference)

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device) -> Batch:
        return Batch.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, device)

    @classmethod
    def join(cls, parts: Sequence[Experience]) -> Experience:
        """The ranks' parts, in rank order, as one."""
        width = max(part.logprobs.shape[1] for part in parts)
        counts = [int(part.lengths.sum()) for part in parts]

        def tokens(of: Callable[[Experience], Tensor]) -> Tensor:
            return torch.cat([functional.pad(of(part), (0, width - of(part).shape[1])) for part in parts])

        return cls(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            responses=tuple(response for part in parts for response in part.responses),
            finished=torch.cat([part.finished for part in parts]),
            scores=torch.cat([part.scores for part in parts]),
            spreads=torch.cat([part.spreads for part in parts]),
            violations=torch.cat([part.violations for part in parts]),
            logprobs=tokens(lambda part: part.logprobs),
            sampled=tokens(lambda part: part.sampled),
            reference=tokens(lambda part: part.reference),
            values=tokens(lambda part: part.values),
            entropies=tokens(lambda part: part.entropies),
            sampler_gap=sum(part.sampler_gap * count for part, count in zip(parts, counts, strict=True)) / sum(counts),
            generate_seconds=sum(part.generate_seconds for part in parts) / len(parts),
            score_seconds=sum(part.score_seconds for part in parts) / len(parts),
        )


def sampler_gap(sampled: Tensor, logprobs: Tensor, lengths: Tensor) -> float:
    """Mean |log p(sampler) - log p(trainer)| over the tokens of replies of these lengths (B,)."""
    return float((sampled - logprobs).abs().sum() / lengths.sum())


def refuse_stale_sampler(step: int, experience: Experience) -> None:
    if experience.sampler_gap > STALE_SAMPLER:
        raise RuntimeError(
            f"step {step}: the sampler's log-probabilities are off by {experience.sampler_gap:.3f} nats per token; "
            "it does not hold the trainer's weights"
        )


def refuse_foreign_weights(
    lm: Any, sampler: Generator, prompts: Sequence[Prompt], params: SamplingParams, pad_id: int, seed: int
) -> None:
    """After weights were handed over: a few short replies, as likely to the sampler as to ``lm``. Rollouts are compared
    as a whole besides; what is sampled for a look or a gate is compared here alone."""
    short = replace(params, max_new_tokens=min(params.max_new_tokens, _PROBE_TOKENS))
    asked = [Request(prompt.ids, SampleKey(seed, 0, row)) for row, prompt in enumerate(prompts[:_PROBE_ROWS])]
    completions = sampler.generate(asked, short)
    device = next(lm.parameters()).device
    batch = Batch.of([request.prompt for request in asked], [each.tokens for each in completions], pad_id, device)
    logprobs = reference_logprobs(lm, batch, params.temperature).cpu()
    sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
    gap = sampler_gap(sampled, logprobs, batch.lengths.cpu())
    if gap > STALE_SAMPLER:
        raise RuntimeError(
            f"the sampler's log-probabilities are off by {gap:.3f} nats per token right after it was given the "
            "weights; it does not hold the trainer's weights"
        )


@dataclass(frozen=True)
class Collector:
    """Turns prompts into experience: ``samples`` rows of each. Every rank calls ``collect`` with the same prompts.

    Without ``forward`` the log-probs are the sampler's, and there are neither values nor entropies.
    """

    world: World
    encoder: Encoder
    forward: Callable[[Batch, float], Any] | None  # the engine's: log-probs, values, entropies
    sampler: Callable[[], AbstractContextManager[Generator]]  # a generator holding the current weights
    reference: Any
    scorer: Scorer
    params: SamplingParams
    rows_per_pass: int
    std_penalty: float
    seed: int
    samples: int = 1
    violates: Callable[[str], bool] | None = None  # judges a reply's text

    @torch.no_grad()
    def collect(self, step: int, prompts: Sequence[Prompt]) -> Experience:
        rows = [prompt for prompt in prompts for _ in range(self.samples)]
        share = self.world.share(len(rows))
        mine = rows[share]
        began = time.monotonic()
        keys = range(len(rows))[share]
        requests = [Request(p.ids, SampleKey(self.seed, step, key)) for p, key in zip(mine, keys, strict=True)]
        with self.sampler() as sampler:
            completions = sampler.generate(requests, self.params)
        generated = time.monotonic()
        local = self._score(mine, completions, generated - began, generated)
        whole = Experience.join(self.world.gather(local))
        refuse_stale_sampler(step, whole)
        return whole

    def _score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], generate_seconds: float, began: float
    ) -> Experience:
        ids = tuple(prompt.ids for prompt in prompts)
        responses = tuple(completion.tokens for completion in completions)
        sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
        logprobs, values, entropies, reference = self._passes(ids, responses, sampled)
        texts = [self.encoder.decode(response) for response in responses]
        mean, spread = self.scorer([prompt.text for prompt in prompts], texts)
        return Experience(
            prompts=ids,
            responses=responses,
            finished=torch.tensor([completion.finish_reason == "stop" for completion in completions]),
            scores=conservative(mean, spread, self.std_penalty).cpu(),
            spreads=spread.cpu(),
            violations=torch.tensor([float(self.violates is not None and self.violates(text)) for text in texts]),
            logprobs=logprobs,
            sampled=sampled,
            reference=reference,
            values=values,
            entropies=entropies,
            sampler_gap=sampler_gap(sampled, logprobs, torch.tensor([len(response) for response in responses])),
            generate_seconds=generate_seconds,
            score_seconds=time.monotonic() - began,
        )

    def _passes(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], sampled: Tensor
    ) -> list[Tensor]:
        """Log-probs, values, entropies and the reference's log-probs (B, T), ``rows_per_pass`` at a time."""
        parts: list[list[Tensor]] = []
        for start in range(0, len(prompts), self.rows_per_pass):
            rows = slice(start, start + self.rows_per_pass)
            batch = Batch.of(prompts[rows], responses[rows], self.encoder.pad_id, self.world.device)
            reference = reference_logprobs(self.reference, batch, self.params.temperature)
            own = () if self.forward is None else self.forward(batch, self.params.temperature)
            missing = sampled.shape[1] - batch.width
            parts.append([functional.pad(each.cpu(), (0, missing)) for each in (*own, reference)])
        *own, reference = [torch.cat(each) for each in zip(*parts, strict=True)]
        return [*(own or (sampled, torch.zeros_like(sampled), torch.zeros_like(sampled))), reference]
