"""The gate of a policy: win rate against its opponent (its base, or a student's teacher) and rate of unsafe replies,
on prompts it was never trained on. Without any reward model nothing judges the win rate, and no verdict is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_trainer.algos.kl import k1
from rlhf_trainer.config import ONLINE, Evaluation, Opponent
from rlhf_trainer.evals.stats import Interval, clustered_student
from rlhf_trainer.evals.verdicts import at_least, at_most, rate_at_most, unknown
from rlhf_trainer.evals.win_rate import RewardJudge, length_controlled_win_rate, outcomes, win_rate
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
_POLICY, _OPPONENT = 0, 1  # steps of the evaluation stream: the two policies draw independently


@dataclass(frozen=True)
class Compared:
    """Two replies to one prompt before the judge."""

    result: float  # 1 the policy wins, 0 its opponent, ½ a tie
    reward: float  # of the policy's reply
    length: int  # of the policy's reply, tokens
    other_length: int


@dataclass(frozen=True)
class Judged:
    """One evaluation sample."""

    index: int
    prompt: str
    compared: Compared | None  # None: there is no judge
    violation: bool
    kl: float  # of the policy's reply to the reference, nats


class PolicyGate:
    """Replies of policy and opponent to held-out prompts, judged by the audit reward model where there is one."""

    def __init__(
        self,
        session: Session,
        inputs: PolicyInputs,
        sampler: Generator,
        reference: Any,
        policy_lm: Any,
        opponent_lm: Any,
    ) -> None:
        self._session, self._inputs = session, inputs
        self._policy, self._reference = policy_lm, reference
        encoder = inputs.encoder
        self._samplers = (sampler, CachedGenerator(opponent_lm, pad_id=encoder.pad_id, eos_id=encoder.eos_id))
        audit = session.config.audit_reward_model
        self._audited = audit is not None
        judge = audit or inputs.given_reward_model
        self._scorer = None if judge is None else load_reward_model(judge.path, session.world.device, encoder)
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
        ours = self._reply(_POLICY, rows, prompts)
        replies = [self._inputs.encoder.decode(completion.tokens) for completion in ours]
        compared = self._compare(rows, prompts, ours, replies)
        divergence = self._sequence_kl(prompts, ours)
        return [
            Judged(row, prompt.text, one, self._violates(reply), kl)
            for row, prompt, one, reply, kl in zip(rows, prompts, compared, replies, divergence, strict=True)
        ]

    def _compare(
        self, rows: Sequence[int], prompts: Sequence[Prompt], ours: Sequence[Completion], replies: Sequence[str]
    ) -> Sequence[Compared | None]:
        """Each reply against the opponent's to the same prompt."""
        if self._scorer is None:
            return [None] * len(rows)
        texts = [prompt.text for prompt in prompts]
        theirs = self._reply(_OPPONENT, rows, prompts)
        others = [self._inputs.encoder.decode(completion.tokens) for completion in theirs]
        results = outcomes(RewardJudge(self._scorer), texts, replies, others)
        rewards = self._scorer(texts, replies)[0].tolist()
        return [
            Compared(result, reward, len(own.tokens), len(other.tokens))
            for result, reward, own, other in zip(results, rewards, ours, theirs, strict=True)
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
        verdicts = []
        compared = _compared(judged)
        if compared:
            interval = win_rate([one.result for one in compared], [one.prompt for one in judged])
            name = "nonInferiority" if evaluation.against is Opponent.TEACHER else "winRate"
            verdicts.append(at_least(name, interval, evaluation.min_win_rate, self._judge_note(evaluation)))
        if evaluation.min_length_controlled_win_rate is not None:
            verdicts.append(self._length_verdict(judged, evaluation, evaluation.min_length_controlled_win_rate))
        if evaluation.max_kl is not None:
            kl = clustered_student([one.kl for one in judged], [one.prompt for one in judged])
            verdicts.append(at_most("evaluationKl", kl, evaluation.max_kl, "KL from the reference, nats per reply"))
        if self._filter is not None:
            verdicts.append(violation_verdict(judged, evaluation.max_violation_rate))
        return tuple(verdicts)

    def _length_verdict(self, judged: Sequence[Judged], evaluation: Evaluation, threshold: float) -> Verdict:
        metric = "lengthControlledWinRate"
        if not _compared(judged):
            missing = "minLengthControlledWinRate is judged by auditRewardModel or rewardModel; name one"
            return unknown(metric, threshold, missing)
        return at_least(metric, _at_equal_length(judged), threshold, f"at equal length, {self._judge_note(evaluation)}")

    def _judge_note(self, evaluation: Evaluation) -> str:
        against = "against its teacher, " if evaluation.against is Opponent.TEACHER else ""
        if self._audited:
            return against + "judged by the audit reward model"
        if self._inputs.training.algorithm not in ONLINE:
            return against + "judged by the reward model"
        return "judged by the optimised reward model itself, which flatters; an auditRewardModel would be independent"

    def _figures(self, judged: Sequence[Judged]) -> dict[str, float]:
        count = len(judged)
        figures = {"evaluationKl": sum(one.kl for one in judged) / count}
        if compared := _compared(judged):
            results = [one.result for one in compared]
            figures["winRate"] = sum(results) / count
            figures["lengthControlledWinRate"] = _at_equal_length(judged).estimate
            if self._audited:
                figures["auditReward"] = sum(one.reward for one in compared) / count
        if self._filter is not None:
            figures["violationRate"] = sum(one.violation for one in judged) / count
        return figures


def violation_verdict(judged: Sequence[Judged], limit: float) -> Verdict:
    """Prompts are counted, as in a safety suite: where ``samples`` exceeds the held-out prompts, they are asked again,
    and replies counted one by one would make the exact bound too narrow."""
    unsafe: dict[str, bool] = {}
    for one in judged:
        unsafe[one.prompt] = unsafe.get(one.prompt, False) or one.violation
    asked = f", {len(judged)} replies" if len(judged) > len(unsafe) else ""
    note = f"held-out prompts that draw an unsafe reply{asked}, judged by the safety filter"
    return rate_at_most("violationRate", sum(unsafe.values()), len(unsafe), limit, note)


def _at_equal_length(judged: Sequence[Judged]) -> Interval:
    compared = _compared(judged)
    return length_controlled_win_rate(
        [one.result for one in compared],
        [one.length for one in compared],
        [one.other_length for one in compared],
        [one.prompt for one in judged],
    )


def _compared(judged: Sequence[Judged]) -> list[Compared]:
    """Every sample's comparison, or none at all: a judge judges all of them."""
    return [one.compared for one in judged if one.compared is not None]
