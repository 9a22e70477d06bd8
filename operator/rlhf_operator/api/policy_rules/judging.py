"""What judges and watches: the evaluation needs its judges, a guardrail a metric that is reported."""

from __future__ import annotations

from rlhf_operator.api.policy_rules.rule import Rule, one_of
from rlhf_trainer.config import FROM_PREFERENCES, ONLINE, Algorithm, GuardrailMetric, Opponent

# The rest is reported whatever trains.
REPORTED_BY = {
    GuardrailMetric.REWARD: ONLINE,
    GuardrailMetric.REWARD_STD: ONLINE,
    GuardrailMetric.ZERO_VARIANCE_FRACTION: ONLINE,
    GuardrailMetric.CLIPPED_FRACTION: ONLINE | {Algorithm.DISTILLATION},
    GuardrailMetric.KL: ONLINE,
    GuardrailMetric.CHOSEN_REWARD: FROM_PREFERENCES,
    GuardrailMetric.REWARD_MARGIN: FROM_PREFERENCES,
}


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


EVALUATION = (
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
    Rule(
        "!has(self.evaluation.minLengthControlledWinRate) || has(self.rewardModel) || has(self.auditRewardModel)",
        lambda spec: (
            spec.evaluation.min_length_controlled_win_rate is None
            or spec.reward_model is not None
            or spec.audit_reward_model is not None
        ),
        "evaluation.minLengthControlledWinRate is judged by auditRewardModel or rewardModel: name one, or remove it",
        ".evaluation.minLengthControlledWinRate",
    ),
    Rule(
        "!has(self.evaluation.safetySuite) || has(self.evaluation.safetyFilter)",
        lambda spec: spec.evaluation.safety_suite is None or spec.evaluation.safety_filter is not None,
        "evaluation.safetySuite is judged by evaluation.safetyFilter: name one, or remove the suite",
        ".evaluation.safetySuite",
    ),
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
        "a guardrail watches what training.algorithm reports: kl, reward, rewardStd and zeroVarianceFraction are of "
        "algorithms with a rewardModel, clippedFraction of these and Distillation, chosenReward and rewardMargin of "
        "DPO and KTO: watch another metric",
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
