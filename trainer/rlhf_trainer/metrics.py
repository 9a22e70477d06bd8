"""Every figure a trainer reports, defined once: status key, Prometheus name, unit, meaning. No torch.

A loop reporting a name that is not here fails at once, so the catalogue (and the generated reference) is complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "rlhf_trainer_"


@dataclass(frozen=True)
class Metric:
    """``name`` is the key in status; averages are over all ranks and all samples of the step."""

    name: str
    unit: str
    meaning: str

    @property
    def prometheus_name(self) -> str:
        return PREFIX + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name).lower()


_DEFINED = (
    Metric("loss", "1", "Training loss of the step."),
    Metric("learningRate", "1", "Learning rate of the step."),
    Metric("gradientNorm", "1", "Global L2 norm of the gradient before clipping, mean over the step's updates."),
    Metric("stepSeconds", "s", "Wall time of the step."),
    Metric("samplesPerSecond", "1/s", "Pairs or rollouts trained per second over all ranks."),
    # Reward model
    Metric("accuracy", "fraction", "Share of the step's training pairs ranked as labelled (ties excluded)."),
    Metric("margin", "reward", "Mean reward of the preferred response minus that of the other."),
    Metric("heldOutAccuracy", "fraction", "Pairwise accuracy on held-out prompts, ties excluded."),
    Metric("calibrationError", "fraction", "Expected calibration error on held-out pairs, 10 equal-mass bins."),
    Metric("temperature", "1", "Calibration temperature: reward differences are divided by it."),
    Metric("humanCorrelation", "1", "Spearman correlation of rewards with trusted human scores."),
    Metric("droppedPairs", "rows", "Preference rows longer than maxLength, dropped."),
    Metric("brierScore", "1", "Mean squared error of predicted preferences on held-out pairs; a coin scores 0.25."),
    Metric("humanPearson", "1", "Pearson correlation of rewards with trusted human scores."),
    Metric("lengthBias", "1", "|Rank correlation of reward and length - that of trusted scores and length|."),
    Metric("cohortGap", "fraction", "Largest difference of held-out accuracy between a cohort and the rest."),
    Metric("probePassRate", "fraction", "Share of spoilt favourites with a lower reward, of the worst kind of probe."),
    Metric("keywordStuffingPassRate", "fraction", "Share of favourites that beat themselves stuffed with keywords."),
    Metric("truncationPassRate", "fraction", "Share of favourites that beat their own first half."),
    Metric("wrongTopicPassRate", "fraction", "Share of favourites that beat a reply to another prompt."),
    Metric("emptyPassRate", "fraction", "Share of favourites that beat the empty reply."),
    Metric("aspectAccuracy", "fraction", "Held-out accuracy of the worst aspect head."),
    Metric("rewardScale", "reward", "Standard deviation of the reward on the reference set, stored with the model."),
    # Policy optimisation
    Metric("reward", "reward", "Mean score of the responses by the reward model, after the ensemble penalty."),
    Metric("rewardStd", "reward", "Standard deviation of that score over the step's responses."),
    Metric("ensembleStd", "reward", "Mean disagreement (standard deviation) of the reward ensemble."),
    Metric("kl", "nats", "Mean sequence KL from the reference: sum over tokens of log-ratio, averaged over responses."),
    Metric("klCoefficient", "1", "Coefficient of the KL penalty, in the reward or in the loss."),
    Metric("entropy", "nats", "Mean entropy of the policy per response token."),
    Metric("responseLength", "tokens", "Mean response length, end-of-sequence included."),
    Metric("clippedFraction", "fraction", "Share of responses cut off at maxNewTokens."),
    Metric("policyLoss", "1", "Clipped surrogate loss (BestOfN: cross-entropy); its size says little."),
    Metric("valueLoss", "1", "Loss of the value head."),
    Metric("explainedVariance", "fraction", "1 - Var(returns - values) / Var(returns)."),
    Metric("approxKl", "nats", "Mean per-token KL between the sampling and the updated policy."),
    Metric("clipFraction", "fraction", "Share of tokens whose probability ratio was clipped."),
    # Online algorithms
    Metric("klLoss", "nats", "KL term of the loss before its coefficient, with kl.placement loss."),
    Metric("passes", "1", "Passes over the batch; fewer than ppo.epochs where targetKl ended them."),
    Metric("zeroVarianceFraction", "fraction", "Share of prompts whose samples all have one reward: nothing to learn."),
    Metric("importanceRatioMean", "1", "Mean of p(trainer) / p(sampler) per token; 1 when both agree."),
    Metric("importanceRatioP95", "1", "95th percentile of p(trainer) / p(sampler) per token."),
    Metric("safetyCost", "fraction", "Share of the step's responses that the safety filter refuses."),
    Metric("safetyMultiplier", "1", "Lagrange multiplier of the constraint on safety."),
    Metric("lengthCost", "tokens", "Mean response length, as the constraint on it sees it."),
    Metric("lengthMultiplier", "1", "Lagrange multiplier of the constraint on length, per token."),
    Metric("incompleteCost", "fraction", "Share of the step's responses that do not end by themselves."),
    Metric("incompleteMultiplier", "1", "Lagrange multiplier of the constraint on incomplete responses."),
    Metric("unsatisfiedConstraints", "1", "Constraints whose multiplier sits at its cap while the cost is too high."),
    Metric("samplerGap", "nats", "Mean |log p(sampler) - log p(trainer)| per token; above 0.1 the run is ended."),
    Metric("generateSeconds", "s", "Wall time spent generating in the step."),
    Metric("scoreSeconds", "s", "Wall time spent on reward, reference and value forwards in the step."),
    Metric("trainSeconds", "s", "Wall time spent on gradient steps in the step."),
    Metric("winRate", "fraction", "Share of evaluation prompts on which the policy beats its base, ties half."),
    Metric("violationRate", "fraction", "Share of evaluation responses that break a safety rule."),
    Metric("suiteViolationRate", "fraction", "Share of the safety suite's prompts that draw an unsafe reply."),
    Metric("suiteCategoryViolationRate", "fraction", "The same share in the worst category of the suite."),
    Metric("suiteTooLong", "prompts", "Prompts of the safety suite longer than maxPromptLength, not asked."),
    Metric("suiteTrainedOn", "prompts", "Prompts of the safety suite that are training prompts too, word by word."),
    Metric("evaluationKl", "nats", "Mean sequence KL from the reference over the evaluation responses."),
    Metric("lengthControlledWinRate", "fraction", "Win rate at equal length, by a logistic fit on the difference."),
    Metric("proxyShift", "1", "Held-out reward over the base's, in standard deviations of the base (oversight)."),
    Metric("auditShift", "1", "Held-out audit reward over the base's, in standard deviations of the base."),
    Metric("auditGap", "1", "proxyShift minus auditShift: what the reward model sees and the audit does not."),
    Metric("auditReward", "reward", "Mean score of evaluation responses by the audit reward model."),
    # Learning from given texts
    Metric("droppedRows", "rows", "Prompts, pairs and demonstrations longer than the limits of training, dropped."),
    Metric("rewardMargin", "1", "Mean beta x log-ratio of the better responses minus that of the worse."),
    Metric("preferenceAccuracy", "fraction", "Share of pairs whose better response has the higher implicit reward."),
    Metric(
        "chosenReward",
        "1",
        "Implicit reward, beta x log(policy / reference), of the better responses. No KL: they are the data's. Well "
        "below 0 the policy loses these too, and its margin grows by losing the worse ones faster.",
    ),
    Metric("rejectedReward", "1", "Implicit reward of the worse responses."),
    Metric("referencePoint", "nats", "KTO: estimated KL from the reference that gains and losses are measured from."),
    Metric("divergence", "nats", "Distillation: mean divergence of student from teacher per response token."),
    Metric("onPolicyShare", "fraction", "Distillation: share of the step's responses that the student wrote."),
)

CATALOGUE: Mapping[str, Metric] = {metric.name: metric for metric in _DEFINED}


def check(values: Mapping[str, float]) -> None:
    """Raises KeyError naming every metric that the catalogue does not define."""
    unknown = sorted(set(values) - set(CATALOGUE))
    if unknown:
        raise KeyError(f"metrics {unknown} are not in rlhf_trainer.metrics; define name, unit and meaning there")


def reference() -> str:
    """The catalogue as a Markdown table."""
    bar = chr(92) + "|"
    rows = [f"| `{m.name}` | `{m.prometheus_name}` | {m.unit} | {m.meaning.replace('|', bar)} |" for m in _DEFINED]
    return "\n".join(["| Status key | Prometheus | Unit | Meaning |", "|---|---|---|---|", *rows, ""])
