"""Before the first step: is the reward model worth optimising? Best of n of the base's replies, judged by the audit.

Sampling costs a fraction of training, and a reward model whose favourites the audit does not like is refused here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_trainer.config import ONLINE, BestOfNPreflight
from rlhf_trainer.evals.best_of_n import judge
from rlhf_trainer.exits import GateRefused, Invalid
from rlhf_trainer.generate.cached import CachedGenerator
from rlhf_trainer.loops.common import Session
from rlhf_trainer.loops.held_out import HeldOutReplies, as_optimised
from rlhf_trainer.loops.policy_inputs import PolicyInputs
from rlhf_trainer.models.reward import load_reward_model
from rlhf_trainer.randomness import Stream
from rlhf_trainer.wire import Verdict, VerdictState


def best_of_n_preflight(session: Session, inputs: PolicyInputs, base: Any) -> tuple[Verdict, ...]:
    """The verdicts, none where the evaluation asks for no preflight. Collective.

    Raises GateRefused (exit 10) unless all pass: what is undecided now would refuse the finished policy too, and more
    prompts cost less than a training run. A resumed run repeats it, with the same draws and the same answer.
    """
    evaluation = session.config.evaluation
    wanted = None if evaluation is None else evaluation.best_of_n
    if wanted is None:
        return ()
    if inputs.training.algorithm not in ONLINE:
        raise Invalid(
            f"evaluation.bestOfN is given, but {inputs.training.algorithm.value} optimises no reward model; remove it"
        )
    verdicts = _judge(session, inputs, base, wanted)
    session.board.verdicts(verdicts)
    refusing = [verdict for verdict in verdicts if verdict.state is not VerdictState.PASS]
    if refusing:
        failed = any(verdict.state is VerdictState.FAIL for verdict in refusing)
        said = "; ".join(f"{verdict.metric} {verdict.state.value}: {verdict.message}" for verdict in refusing)
        remedy = (
            "the reward model is not worth optimising: look at its labels"
            if failed
            else "raise evaluation.bestOfN.prompts"
        )
        raise GateRefused(f"{said}; {remedy}; nothing was trained", "BestOfNFailed" if failed else "BestOfNUndecided")
    return verdicts


def _judge(session: Session, inputs: PolicyInputs, base: Any, wanted: BestOfNPreflight) -> tuple[Verdict, ...]:
    located = session.config.audit_reward_model
    if located is None:
        raise Invalid("spec.evaluation.bestOfN needs spec.auditRewardModel: another judge than the one it checks")
    device, encoder = session.world.device, inputs.encoder
    proxy = load_reward_model(inputs.reward_model.path, device, encoder)
    audit = load_reward_model(located.path, device, encoder)
    replies = HeldOutReplies(session, inputs, Stream.PREFLIGHT)
    prompts = replies.prompts(min(wanted.prompts, len(inputs.holdout_prompts)))
    sampler = CachedGenerator(base, pad_id=encoder.pad_id, eos_id=encoder.eos_id)
    scorers = [as_optimised(proxy, inputs.training.reward_std_penalty), as_optimised(audit, 0.0)]
    scores = replies.score(sampler, [prompt for prompt in prompts for _ in range(wanted.samples_per_prompt)], scorers)
    by_proxy, by_audit = (
        np.array(values, dtype=np.float64).reshape(len(prompts), wanted.samples_per_prompt) for values in scores
    )
    return judge(by_proxy, by_audit, wanted)
