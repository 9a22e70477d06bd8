"""The metrics of a step of an online algorithm; equal on all ranks, since all hold the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_trainer.algos.advantages import Moments, equal_groups
from rlhf_trainer.algos.importance import ratios, spread
from rlhf_trainer.config import Algorithm, KLPlacement, PolicyTraining
from rlhf_trainer.loops.estimators import Targets
from rlhf_trainer.loops.rollout import Experience


def sample_figures(experience: Experience, targets: Targets, training: PolicyTraining) -> dict[str, float]:
    """Metrics of the sampled batch."""
    mask = targets.mask
    mean, p95 = spread(ratios(experience.logprobs, experience.sampled, mask), mask)
    figures = {
        "reward": float(experience.scores.mean()),
        "rewardStd": float(experience.scores.std()) if len(experience.scores) > 1 else 0.0,
        "zeroVarianceFraction": equal_groups(targets.outcomes, training.samples_per_prompt),
        "ensembleStd": float(experience.spreads.mean()),
        "entropy": float(experience.entropies.sum() / mask.sum()),
        "responseLength": float(experience.lengths.float().mean()),
        "clippedFraction": float((~experience.finished).float().mean()),
        "samplerGap": experience.sampler_gap,
        "importanceRatioMean": mean,
        "importanceRatioP95": p95,
        "generateSeconds": experience.generate_seconds,
        "scoreSeconds": experience.score_seconds,
    }
    if training.algorithm is Algorithm.PPO:
        figures["explainedVariance"] = _explained_variance(experience, targets)
    return figures


def loss_figures(
    sums: Mapping[str, float], updates: int, training: PolicyTraining, kl_coefficient: float
) -> dict[str, float]:
    """Metrics of the ``updates`` mini batches whose sums over all ranks are given."""
    losses = {"policyLoss": sums["policyLoss"] / updates}
    total = losses["policyLoss"] + kl_coefficient * sums["klLoss"] / updates
    if training.kl.placement is KLPlacement.LOSS:
        losses["klLoss"] = sums["klLoss"] / updates
    if training.algorithm is Algorithm.PPO:
        losses["valueLoss"] = sums["valueLoss"] / updates
        total += training.ppo.value_coefficient * losses["valueLoss"]
    means = {name: sums[name] / sums["tokens"] for name in ("clipFraction", "approxKl")}
    return losses | means | {"loss": total}


def _explained_variance(experience: Experience, targets: Targets) -> float:
    returns = Moments.of(targets.returns, targets.mask)
    residual = Moments.of(targets.returns - experience.values, targets.mask)
    return 1.0 - residual.variance / returns.variance if returns.variance > 0 else 0.0
