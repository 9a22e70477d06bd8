"""Policy jobs that break one rule each: refused by the API server, and by an operator whose CRDs are older."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.cluster.samples import DELETED, example
from tests.training_fields import OTHER, entry_of, readers_of, set_to_other

PPO, GRPO, LAGRANGIAN = "policy-optimization-job", "grpo", "lagrangian"
DPO, KTO, SFT, DISTILLATION = "dpo", "kto", "sft", "distillation"
FAMILIES = (PPO, GRPO, LAGRANGIAN, DPO, KTO, SFT, DISTILLATION)
SOURCE = {"uri": "pvc://feedback/other.jsonl", "digest": "sha256:" + "9" * 64}
SUITE = {**SOURCE, "maxViolationRate": 0.05}
JOB = {"jobRef": {"name": "other"}}
GUARDRAIL = {"forSteps": 3, "action": "Alert", "above": 1}


class Case(NamedTuple):
    name: str
    example: str
    changes: dict[str, Any]
    message: tuple[str, ...]  # fragments, all of them


def guardrail(**fields: Any) -> dict[str, Any]:
    return {"spec.guardrails": [{**GUARDRAIL, **fields}]}


def constraint(**fields: Any) -> dict[str, Any]:
    return {"spec.training.constraints": [{"cost": "incomplete", "limit": 0.1, **fields}]}


def unread(field: str) -> Case:
    """An example whose algorithm does not read this field, with the field."""
    entry, readers = entry_of(field), readers_of(field)
    file = next(file for file in FAMILIES if example(file)["spec"]["training"]["algorithm"] not in readers)
    changes = {f"spec.training.{path}": value for path, value in _leaves(set_to_other(field))}
    refusal = (f"spec.training.{entry}: Invalid value", f"training.{entry}: leave it out, or choose another training")
    return Case(f"{field} for {file}", file, changes, refusal)


def _leaves(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """So that what the example says beside them stays."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{path}", leaf) for path, leaf in _leaves(value))
        else:
            yield name, value


FIXED = {"spec.training.kl.controller": "fixed"}
IN_VAIN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (PPO, "kl.target", {**FIXED, "spec.training.kl.target": 2}),
    (PPO, "kl.horizon", {**FIXED, "spec.training.kl.horizon": 50, "spec.training.kl.target": DELETED}),
    (PPO, "ppo.targetKl", {"spec.training.ppo.epochs": 1, "spec.training.ppo.targetKl": 0.1}),
    (DISTILLATION, "distillation.beta", {"spec.training.distillation": {"divergence": "reverse", "beta": 0.9}}),
    (
        DISTILLATION,
        "distillation.divergence",
        {"spec.training.distillation": {"mode": "sequence", "divergence": "reverse"}},
    ),
    (
        DISTILLATION,
        "distillation.onPolicyFraction",
        {"spec.training.distillation": {"mode": "sequence", "onPolicyFraction": 1}},
    ),
)
POLICY_CASES = [
    # inputs
    Case("PPO without its reward model", PPO, {"spec.rewardModel": DELETED}, ("spec.rewardModel", "add spec.rewardM")),
    Case("GRPO without one", GRPO, {"spec.rewardModel": DELETED}, ("learn from rewardModel: add spec.rewardModel",)),
    Case("DPO with a reward model", DPO, {"spec.rewardModel": JOB}, ("spec.rewardModel", "remove spec.rewardModel")),
    Case("DPO without preferences", DPO, {"spec.preferences": DELETED}, ("DPO and KTO learn", "add spec.preferences")),
    Case("KTO without preferences", KTO, {"spec.preferences": DELETED}, ("spec.preferences", "add spec.preferences")),
    Case("PPO with preferences", PPO, {"spec.preferences": SOURCE}, ("spec.preferences", "remove spec.preferences")),
    Case(
        "SFT without demonstrations", SFT, {"spec.demonstrations": DELETED}, ("SFT learns", "add spec.demonstrations")
    ),
    Case("KTO with demonstrations", KTO, {"spec.demonstrations": SOURCE}, ("remove spec.demonstrations",)),
    Case(
        "distillation without a teacher", DISTILLATION, {"spec.teacher": DELETED}, ("spec.teacher", "add spec.teacher")
    ),
    Case("SFT with a teacher", SFT, {"spec.teacher": JOB}, ("spec.teacher", "remove spec.teacher")),
    Case("a teacher twice", DISTILLATION, {"spec.teacher": {**JOB, **SOURCE}}, ("exactly one of jobRef and uri",)),
    Case("a teacher of nothing", DISTILLATION, {"spec.teacher": {}}, ("spec.teacher", "exactly one of jobRef and uri")),
    Case("preferences of a job", DPO, {"spec.preferences": JOB}, ("spec.preferences",)),
    # sampling
    Case("GRPO with one sample", GRPO, {"spec.training.samplesPerPrompt": 1}, ("samplesPerPrompt to 2 or more",)),
    Case("RLOO by default", PPO, {"spec.training.algorithm": "RLOO"}, ("samplesPerPrompt", "to 2 or more")),
    Case("BestOfN of one", PPO, {"spec.training.algorithm": "BestOfN"}, ("samplesPerPrompt to 2 or more",)),
    Case(
        "groups that do not divide",
        GRPO,
        {"spec.trainer.numProcPerNode": 1, "spec.training.promptsPerStep": 6},
        ("training.promptsPerStep must be divisible", "the samples of a prompt stay together"),
    ),
    Case(
        "a penalty that starts at its end",
        GRPO,
        {"spec.training.overlong.start": 20},
        ("spec.training.overlong.start", "less than training.generation.maxNewTokens"),
    ),
    # policy gradient
    Case("k3 in the reward", PPO, {"spec.training.kl.estimator": "k3"}, ("spec.training.kl", "k2 or k3")),
    Case("k1 in the loss", GRPO, {"spec.training.kl.estimator": "k1"}, ("spec.training.kl", "k2 or k3")),
    Case("a narrower clip-higher", GRPO, {"spec.training.ppo.clipHigh": 0.1}, ("clipHigh", "to clip or more")),
    Case("a dual clip inside the clip", GRPO, {"spec.training.ppo.dualClip": 1.28}, ("dualClip", "above 1 + clipHigh")),
    Case("a dual clip below 1", PPO, {"spec.training.ppo.dualClip": 0.5}, ("dualClip", "greater than 1")),
    # constraints
    Case(
        "a cost twice",
        LAGRANGIAN,
        {"spec.training.constraints.1": {"cost": "safety", "limit": 0.5}},
        ("spec.training.constraints", "name a cost twice"),
    ),
    Case("unmeasured safety", LAGRANGIAN, {"spec.evaluation.safetyFilter": DELETED}, ("by evaluation.safetyFilter",)),
    Case("no reply at all", PPO, constraint(cost="length", limit=0), ("limit on length must be above 0",)),
    Case("a share of everything", PPO, constraint(limit=1), ("constraints", "on safety or incomplete below 1")),
    Case("a start above the cap", PPO, constraint(initialMultiplier=6), ("initialMultiplier must not exceed",)),
    Case("an unknown cost", PPO, constraint(cost="money"), ("constraints[0].cost", '"safety"')),
    # fields that other algorithms read
    *map(unread, OTHER),
    Case(
        "sequences in reverse",
        DISTILLATION,
        {"spec.training.distillation.mode": "sequence"},
        ("spec.training.distillation", "remove divergence, or set mode onPolicy"),
    ),
    # fields that another field makes idle
    *(
        Case(f"{field} in vain", file, changes, (f"spec.training.{field}", "does nothing unless"))
        for file, field, changes in IN_VAIN
    ),
    # evaluation and guardrails
    Case("PPO against a teacher", PPO, {"spec.evaluation.against": "teacher"}, ("evaluation.against", "Distillation")),
    Case("a teacher unjudged", DISTILLATION, {"spec.auditRewardModel": DELETED}, ("evaluation.against", "judged by")),
    Case(
        "equal length unjudged",
        SFT,
        {"spec.evaluation.minLengthControlledWinRate": 0.5},
        ("evaluation.minLengthControlledWinRate", "auditRewardModel or rewardModel: name one"),
    ),
    Case("a suite unjudged", PPO, {"spec.evaluation.safetySuite": SUITE}, ("safetySuite", "safetyFilter: name one")),
    Case(
        "a suite of any rate",
        DPO,
        {"spec.evaluation.safetySuite": SOURCE},
        ("spec.evaluation.safetySuite.maxViolationRate", "Required"),
    ),
    Case("best of n unaudited", GRPO, {"spec.auditRewardModel": DELETED}, ("evaluation.bestOfN", "name both")),
    Case(
        "over-optimisation unaudited",
        GRPO,
        {"spec.auditRewardModel": DELETED, "spec.evaluation.bestOfN": DELETED},
        ("spec.evaluation.overOptimization", "name both, or remove it"),
    ),
    Case("best of n without a reward", DPO, {"spec.evaluation.bestOfN": {}}, ("evaluation.bestOfN", "name both")),
    Case("a guardrail without a bound", PPO, {"spec.guardrails.0.above": DELETED}, ("guardrail", "above, below")),
    Case("a guardrail always breached", PPO, {"spec.guardrails.0.below": 13}, ("below must be less than above",)),
    Case("a reward watched without one", DPO, guardrail(metric="reward"), ("spec.guardrails", "watch another metric")),
    Case("kl of demonstrations", SFT, guardrail(metric="kl"), ("guardrails", "kl, reward, rewardStd and")),
    Case("kl of given replies", DPO, guardrail(metric="kl"), ("guardrails", "chosenReward and rewardMargin of DPO")),
    Case("a margin of sampled replies", PPO, guardrail(metric="rewardMargin"), ("rewardMargin of DPO and KTO",)),
    Case("cut replies of pairs", KTO, guardrail(metric="clippedFraction"), ("clippedFraction of these and Distill",)),
    Case("variance of single samples", PPO, guardrail(metric="zeroVarianceFraction"), ("needs training.samplesPerPr",)),
]

# Only the API server sees these: the operator compares worlds, digests and names when it resolves them.
SERVER_ONLY = {"groups that do not divide", "a teacher twice", "a teacher of nothing"}
SELF_REFERENCES = [
    Case(
        "a job that teaches itself",
        DISTILLATION,
        {"spec.teacher.jobRef.name": "small-desk"},
        ("spec.teacher", "name another PolicyOptimizationJob"),
    ),
    Case(
        "a job that starts from itself",
        DISTILLATION,
        {"spec.policy": {"jobRef": {"name": "small-desk"}}},
        ("spec.policy", "name another PolicyOptimizationJob"),
    ),
]
