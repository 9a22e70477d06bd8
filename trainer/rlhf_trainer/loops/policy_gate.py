"""The gate of a policy: win rate against its base and rate of unsafe replies, on prompts it was never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_trainer.algos.kl import k1
from rlhf_trainer.config import Evaluation
from rlhf_trainer.evals.verdicts import at_least, rate_at_most
from rlhf_trainer.evals.win_rate import RewardJudge, outcomes, win_rate
from rlhf_trainer.generate.base import Completion, Generator, Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.models.policy import Batch, score_tokens
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.randomness import Stream, generator
from rlhf_trainer.safety.scorer import LinearFilter
from rlhf_trainer.wire import Verdict

_ROWS_PER_PASS = 64  # between two signs of life
_POLICY, _BASE = 0, 1  # steps of the evaluation stream: the two policies draw independently


@dataclass(frozen=True)
class Judged:
    """One evaluation sample."""

    index: int
    prompt: str
    result: float  # 1 the policy wins, 0 its base, ½ a tie
    reward: float  # of the policy's reply, by the judge
    violation: bool
    kl: float  # of the policy's reply to the reference, nats


class PolicyGate:
    """Replies of policy and base to held-out prompts, judged by the audit reward model where there is one."""

    def __init__(
        self, session: Session, inputs: PolicyInputs, sampler: Generator, reference: Any, policy_lm: Any
    ) -> None:
        self._session, self._inputs = session, inputs
        self._policy, self._reference = policy_lm, reference
        encoder = inputs.encoder
        self._samplers = (sampler, CachedGenerator(reference, pad_id=encoder.pad_id, eos_id=encoder.eos_id))
        audit = session.config.audit_reward_model
        self._audited = audit is not None
        self._scorer = load_reward_model((audit or inputs.reward_model).path, session.world.device, encoder)
        located = session.config.safety_filter
        self._filter = None if located is None else LinearFilter.read(Path(located.path))

    def judge(self, evaluation: Evaluation) -> tuple[tuple[Verdict, ...], dict[str, float]]:
        """Verdicts and figures, equal on all ranks; the samples are shared out over them."""
        world = self._session.world
        chosen = self._prompts(evaluation.samples)
        mine = list(range(world.rank, len(chosen), world.size))
        judged: list[Judged] = []
        for start in range(0, -(-len(chosen) // world.size), _ROWS_PER_PASS):
            rows = mine[start : start + _ROWS_PER_PASS]
            judged += self._judge_rows(rows, [chosen[row] for row in rows]) if rows else []
            self._session.pulse()
        whole = sorted((one for part in world.gather(judged) for one in part), key=lambda one: one.index)
        return self._verdicts(whole, evaluation), self._figures(whole)

    def _prompts(self, samples: int) -> list[Prompt]:
        """Held-out prompts in a fixed shuffled order, all of them before any comes twice."""
        holdout = self._inputs.holdout_prompts
        order = generator(self._inputs.training.seed, Stream.EVALUATION).permutation(len(holdout))
        return [holdout[order[index % len(holdout)]] for index in range(samples)]

    def _judge_rows(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> list[Judged]:
        ours, theirs = (self._reply(which, rows, prompts) for which in (_POLICY, _BASE))
        texts = [prompt.text for prompt in prompts]
        replies, others = ([self._inputs.encoder.decode(c.tokens) for c in side] for side in (ours, theirs))
        results = outcomes(RewardJudge(self._scorer), texts, replies, others)
        rewards = self._scorer(texts, replies)[0].tolist()
        divergence = self._sequence_kl(prompts, ours)
        return [
            Judged(row, text, result, reward, self._violates(reply), kl)
            for row, text, result, reward, reply, kl in zip(
                rows, texts, results, rewards, replies, divergence, strict=True
            )
        ]

    def _reply(self, which: int, rows: Sequence[int], prompts: Sequence[Prompt]) -> list[Completion]:
        training = self._inputs.training
        params = SamplingParams(training.generation.max_new_tokens, training.generation.temperature)
        keys = [SampleKey(training.seed, which, row, Stream.EVALUATION) for row in rows]
        requests = [Request(prompt.ids, key) for prompt, key in zip(prompts, keys, strict=True)]
        return self._samplers[which].generate(requests, params)

    def _violates(self, reply: str) -> bool:
        return self._filter is not None and self._filter.violates(reply)

    @torch.no_grad()
    def _sequence_kl(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        batch = Batch.of(
            [prompt.ids for prompt in prompts],
            [completion.tokens for completion in completions],
            self._inputs.encoder.pad_id,
            self._session.world.device,
        )
        temperature = self._inputs.training.generation.temperature
        policy, reference = (score_tokens(lm, batch, temperature).logprobs for lm in (self._policy, self._reference))
        return [float(value) for value in k1(policy, reference).sum(dim=1)]

    def _verdicts(self, judged: Sequence[Judged], evaluation: Evaluation) -> tuple[Verdict, ...]:
        interval = win_rate([one.result for one in judged], [one.prompt for one in judged])
        verdicts = [at_least("winRate", interval, evaluation.min_win_rate, self._judge_note())]
        if self._filter is not None:
            hits = sum(one.violation for one in judged)
            note = "judged by the safety filter"
            verdicts.append(rate_at_most("violationRate", hits, len(judged), evaluation.max_violation_rate, note))
        return tuple(verdicts)

    def _judge_note(self) -> str:
        if self._audited:
            return "judged by the audit reward model"
        return "judged by the optimised reward model itself, which flatters; an auditRewardModel would be independent"

    def _figures(self, judged: Sequence[Judged]) -> dict[str, float]:
        count = len(judged)
        figures = {
            "winRate": sum(one.result for one in judged) / count,
            "evaluationKl": sum(one.kl for one in judged) / count,
        }
        if self._audited:
            figures["auditReward"] = sum(one.reward for one in judged) / count
        if self._filter is not None:
            figures["violationRate"] = sum(one.violation for one in judged) / count
        return figures
