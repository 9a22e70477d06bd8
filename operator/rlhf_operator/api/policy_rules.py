"""What must hold between the fields of a PolicyOptimizationJob: each rule once, for API server and operator.

An algorithm gets exactly the inputs it reads. What it would ignore is refused, because a user who names it believes
that it acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_operator.api.meta import Cel
from rlhf_trainer.config import (
    DPO,
    GROUPED,
    GRPO,
    KTO,
    ONLINE,
    Algorithm,
    Constraint,
    Cost,
    Critic,
    Distillation,
    DistillationMode,
    Divergence,
    GuardrailMetric,
    KLEstimator,
    KLPlacement,
    Opponent,
    Spec,
)

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec

FROM_PREFERENCES = frozenset({Algorithm.DPO, Algorithm.KTO})
FROM_TEXTS = FROM_PREFERENCES | {Algorithm.SFT}  # nothing is sampled while training
CONSTRAINED = ONLINE - {Algorithm.BEST_OF_N}  # a policy gradient to put multipliers in
READ_BY = {
    "rewardModel": ONLINE,
    "preferences": FROM_PREFERENCES,
    "demonstrations": frozenset({Algorithm.SFT}),
    "teacher": frozenset({Algorithm.DISTILLATION}),
}
# The rest is reported whatever trains.
REPORTED_BY = {
    GuardrailMetric.REWARD: ONLINE,
    GuardrailMetric.REWARD_STD: ONLINE,
    GuardrailMetric.ZERO_VARIANCE_FRACTION: ONLINE,
    GuardrailMetric.CLIPPED_FRACTION: ONLINE | {Algorithm.DISTILLATION},
    GuardrailMetric.KL: ONLINE | FROM_PREFERENCES,
}
_BLOCKS: tuple[tuple[str, type[Spec], frozenset[Algorithm]], ...] = (
    ("grpo", GRPO, frozenset({Algorithm.GRPO})),
    ("dpo", DPO, frozenset({Algorithm.DPO})),
    ("kto", KTO, frozenset({Algorithm.KTO})),
    ("distillation", Distillation, frozenset({Algorithm.DISTILLATION})),
)


@dataclass(frozen=True)
class Rule:
    """The same statement in CEL (of `self`, the spec) and in Python; `message` says what to do."""

    cel: str
    holds: Callable[[PolicyOptimizationJobSpec], bool]
    message: str
    at: str = ""  # the field that the server's error names, such as ".training.kl"

    def to_cel(self) -> Cel:
        return Cel(self.cel, self.message, field_path=self.at)


def broken(spec: PolicyOptimizationJobSpec) -> str:
    """The messages of the rules that do not hold; "" when all do."""
    return "; ".join(rule.message for rule in RULES if not rule.holds(spec))


def _names(algorithms: Iterable[Algorithm]) -> str:
    """In the order in which the enum lists them."""
    found = [algorithm.value for algorithm in Algorithm if algorithm in set(algorithms)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def one_of(algorithms: Iterable[Algorithm]) -> str:
    """In CEL: the spec's algorithm is among these."""
    return f"self.training.algorithm in {[a.value for a in Algorithm if a in set(algorithms)]!r}"


def _input_rules(field: str, readers: frozenset[Algorithm]) -> tuple[Rule, Rule]:
    attribute = {"rewardModel": "reward_model"}.get(field, field)

    def named(spec: PolicyOptimizationJobSpec) -> bool:
        return getattr(spec, attribute) is not None

    verb = "learns" if len(readers) == 1 else "learn"
    return (
        Rule(
            f"!({one_of(readers)}) || has(self.{field})",
            lambda spec: spec.training.algorithm not in readers or named(spec),
            f"{_names(readers)} {verb} from {field}: add spec.{field}, or choose another training.algorithm",
            f".{field}",
        ),
        Rule(
            f"!has(self.{field}) || {one_of(readers)}",
            lambda spec: not named(spec) or spec.training.algorithm in readers,
            f"only {_names(readers)} {verb} from {field}: remove spec.{field}, or choose another training.algorithm",
            f".{field}",
        ),
    )


def _block_rule(block: str, model: type[Spec], readers: frozenset[Algorithm]) -> Rule:
    """A block of another algorithm is at its defaults."""
    defaults = model().model_dump(mode="json", by_alias=True)
    same = " && ".join(f"self.training.{block}.{name} == {value!r}" for name, value in defaults.items())
    return Rule(
        f"{one_of(readers)} || ({same})",
        lambda spec: spec.training.algorithm in readers or getattr(spec.training, block) == model(),
        f"training.{block} is read by {_names(readers)} alone: remove it, or choose that training.algorithm",
        f".training.{block}",
    )


def _upper_clip(spec: PolicyOptimizationJobSpec) -> float:
    ppo = spec.training.ppo
    return ppo.clip if ppo.clip_high is None else ppo.clip_high


def _reachable(constraint: Constraint) -> bool:
    return constraint.limit > 0.0 if constraint.cost is Cost.LENGTH else constraint.limit < 1.0


_EACH_CONSTRAINT = "!has(self.training.constraints) || self.training.constraints.all(c, {})"
_PPO = "self.training.ppo"
_UPPER = f"(has({_PPO}.clipHigh) ? {_PPO}.clipHigh : {_PPO}.clip)"

_INPUTS = tuple(rule for field, readers in READ_BY.items() for rule in _input_rules(field, readers))

_SAMPLING = (
    Rule(
        f"!({one_of(GROUPED)}) || self.training.samplesPerPrompt >= 2",
        lambda spec: spec.training.algorithm not in GROUPED or spec.training.samples_per_prompt >= 2,
        f"{_names(GROUPED)} compare the samples of a prompt: set training.samplesPerPrompt to 2 or more",
        ".training.samplesPerPrompt",
    ),
    Rule(
        f"!({one_of(FROM_TEXTS)}) || self.training.samplesPerPrompt == 1",
        lambda spec: spec.training.algorithm not in FROM_TEXTS or spec.training.samples_per_prompt == 1,
        f"{_names(FROM_TEXTS)} sample nothing while training: remove training.samplesPerPrompt",
        ".training.samplesPerPrompt",
    ),
    Rule(
        f"!has(self.training.overlong) || {one_of(ONLINE)}",
        lambda spec: spec.training.overlong is None or spec.training.algorithm in ONLINE,
        f"training.overlong lowers the reward of long responses, so it goes with {_names(ONLINE)}: remove it",
        ".training.overlong",
    ),
    Rule(
        "!has(self.training.overlong) || self.training.overlong.start < self.training.generation.maxNewTokens",
        lambda spec: (
            spec.training.overlong is None or spec.training.overlong.start < spec.training.generation.max_new_tokens
        ),
        "training.overlong.start must be less than training.generation.maxNewTokens, where the penalty is full",
        ".training.overlong.start",
    ),
)

_POLICY_GRADIENT = (
    Rule(
        "(self.training.kl.placement == 'reward') == (self.training.kl.estimator == 'k1')",
        lambda spec: (
            (spec.training.kl.placement is KLPlacement.REWARD) == (spec.training.kl.estimator is KLEstimator.K1)
        ),
        "training.kl: only k1 has the right gradient in the reward, only k2 and k3 in the loss: "
        "set estimator k1 with placement reward, k2 or k3 with placement loss",
        ".training.kl",
    ),
    Rule(
        f"!has({_PPO}.clipHigh) || {_PPO}.clipHigh >= {_PPO}.clip",
        lambda spec: _upper_clip(spec) >= spec.training.ppo.clip,
        "training.ppo.clipHigh widens the clip range upwards: set it to clip or more, or remove it",
        ".training.ppo.clipHigh",
    ),
    Rule(
        f"!has({_PPO}.dualClip) || {_PPO}.dualClip > 1.0 + {_UPPER}",
        lambda spec: spec.training.ppo.dual_clip is None or spec.training.ppo.dual_clip > 1.0 + _upper_clip(spec),
        "training.ppo.dualClip bounds ratios beyond the clip range: set it above 1 + clipHigh (or clip), "
        "3 is usual, or remove it",
        ".training.ppo.dualClip",
    ),
    Rule(
        f"self.training.algorithm == 'PPO' || ({_PPO}.critic == 'shared' && {_PPO}.criticWarmupSteps == 0)",
        lambda spec: (
            spec.training.algorithm is Algorithm.PPO
            or (spec.training.ppo.critic is Critic.SHARED and spec.training.ppo.critic_warmup_steps == 0)
        ),
        "only PPO has a critic: remove training.ppo.critic and training.ppo.criticWarmupSteps",
        ".training.ppo",
    ),
)

_CONSTRAINTS = (
    Rule(
        f"!has(self.training.constraints) || size(self.training.constraints) == 0 || {one_of(CONSTRAINED)}",
        lambda spec: not spec.training.constraints or spec.training.algorithm in CONSTRAINED,
        f"training.constraints are held by {_names(CONSTRAINED)}: remove them, or choose one of these algorithms",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("self.training.constraints.exists_one(d, d.cost == c.cost)"),
        lambda spec: len({c.cost for c in spec.training.constraints}) == len(spec.training.constraints),
        "training.constraints name a cost twice: keep one of them",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.cost != 'safety' || has(self.evaluation.safetyFilter)"),
        lambda spec: (
            spec.evaluation.safety_filter is not None
            or all(constraint.cost is not Cost.SAFETY for constraint in spec.training.constraints)
        ),
        "a constraint on safety is measured by evaluation.safetyFilter: name one",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.cost == 'length' ? c.limit > 0.0 : c.limit < 1.0"),
        lambda spec: all(_reachable(constraint) for constraint in spec.training.constraints),
        "a limit on length must be above 0 (tokens), one on safety or incomplete below 1 (a share of the responses)",
        ".training.constraints",
    ),
    Rule(
        _EACH_CONSTRAINT.format("c.initialMultiplier <= c.maxMultiplier"),
        lambda spec: all(c.initial_multiplier <= c.max_multiplier for c in spec.training.constraints),
        "a constraint's initialMultiplier must not exceed its maxMultiplier: lower it, or raise maxMultiplier",
        ".training.constraints",
    ),
)

_DISTILLATION = (
    Rule(
        "self.training.distillation.mode != 'sequence' || self.training.distillation.divergence == 'forward'",
        lambda spec: (
            spec.training.distillation.mode is not DistillationMode.SEQUENCE
            or spec.training.distillation.divergence is Divergence.FORWARD
        ),
        "training.distillation: learning the teacher's samples (mode sequence) is the forward divergence: "
        "remove divergence, or set mode onPolicy",
        ".training.distillation",
    ),
    Rule(
        "self.evaluation.against != 'teacher' || self.training.algorithm == 'Distillation'",
        lambda spec: (
            spec.evaluation.against is not Opponent.TEACHER or spec.training.algorithm is Algorithm.DISTILLATION
        ),
        "evaluation.against teacher needs training.algorithm Distillation: set policy, or remove it",
        ".evaluation.against",
    ),
    Rule(
        "self.evaluation.against != 'teacher' || has(self.auditRewardModel)",
        lambda spec: spec.evaluation.against is not Opponent.TEACHER or spec.audit_reward_model is not None,
        "evaluation.against teacher is judged by auditRewardModel: name one, or remove against",
        ".evaluation.against",
    ),
)


def _audited(field: str, attribute: str) -> Rule:
    return Rule(
        f"!has(self.evaluation.{field}) || (has(self.rewardModel) && has(self.auditRewardModel))",
        lambda spec: (
            getattr(spec.evaluation, attribute) is None
            or (spec.reward_model is not None and spec.audit_reward_model is not None)
        ),
        f"evaluation.{field} compares rewardModel with auditRewardModel: name both, or remove it",
        f".evaluation.{field}",
    )


_EVALUATION = (
    _audited("bestOfN", "best_of_n"),
    _audited("overOptimization", "over_optimization"),
    Rule(
        "!has(self.guardrails) || self.guardrails.all(g, (has(g.above) || has(g.below))"
        " && (!has(g.above) || !has(g.below) || g.below < g.above))",
        lambda spec: all(
            (g.above is not None or g.below is not None) and (g.above is None or g.below is None or g.below < g.above)
            for g in spec.guardrails
        ),
        "a guardrail needs above, below or both, and below must be less than above",
        ".guardrails",
    ),
    Rule(
        "!has(self.guardrails) || self.guardrails.all(g, {})".format(
            " && ".join(f"(g.metric != '{metric.value}' || {one_of(by)})" for metric, by in REPORTED_BY.items())
        ),
        lambda spec: all(spec.training.algorithm in REPORTED_BY.get(g.metric, set(Algorithm)) for g in spec.guardrails),
        "a guardrail watches what training.algorithm reports: reward, rewardStd and zeroVarianceFraction are of "
        "algorithms with a rewardModel, clippedFraction of these and Distillation, kl of these, DPO and KTO: "
        "watch another metric",
        ".guardrails",
    ),
    Rule(
        "!has(self.guardrails) || self.training.samplesPerPrompt >= 2"
        " || self.guardrails.all(g, g.metric != 'zeroVarianceFraction')",
        lambda spec: (
            spec.training.samples_per_prompt >= 2
            or all(g.metric is not GuardrailMetric.ZERO_VARIANCE_FRACTION for g in spec.guardrails)
        ),
        "a guardrail on zeroVarianceFraction needs training.samplesPerPrompt of 2 or more: watch another metric",
        ".guardrails",
    ),
)

RULES: tuple[Rule, ...] = (
    *_INPUTS,
    *_SAMPLING,
    *_POLICY_GRADIENT,
    *_CONSTRAINTS,
    *(_block_rule(*block) for block in _BLOCKS),
    *_DISTILLATION,
    *_EVALUATION,
)
