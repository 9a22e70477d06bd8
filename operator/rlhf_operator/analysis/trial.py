"""The whole state of one candidate's comparison with stable, and its update by new counts.

The state is a few JSON numbers: it is written to the rollout's status together with the counters it was computed
from, in one patch, so that a crash can neither lose nor repeat a count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from rlhf_operator.analysis import harm, latency, split
from rlhf_operator.analysis.difference import LOWER_STAKES, UPPER_STAKES, Bets
from rlhf_operator.analysis.fold import Counts, Pods, RowName

SHADOW_SHARE = 0.5  # every shadowed prompt goes to both arms


class Metric(StrEnum):
    SAFETY = "safetyViolationRate"
    AVAILABILITY = "availability"
    LATENCY = "latencyP95"


@dataclass(frozen=True)
class Design:
    """How a stage splits traffic."""

    share: float  # configured share of conversations on the candidate, in (0, 1)
    shadow: bool = False

    @classmethod
    def of(cls, weight_percent: float, shadow: bool) -> Design:
        return cls(SHADOW_SHARE, True) if shadow else cls(weight_percent / 100.0)


@dataclass(frozen=True)
class Exposure:
    """Units (conversations that count for a metric) and bad ones of one arm."""

    units: int = 0
    bad: int = 0

    def __add__(self, other: Exposure) -> Exposure:
        return Exposure(self.units + other.units, self.bad + other.bad)


@dataclass(frozen=True)
class Comparison:
    """State of one metric's tests, over all stages of the trial."""

    log_e: tuple[float, ...] = harm.START
    upper: Bets = field(default_factory=lambda: Bets.start(UPPER_STAKES))
    lower: Bets = field(default_factory=lambda: Bets.start(LOWER_STAKES))
    expected_bad: float = 0.0  # bad candidate conversations, were the candidate as good as stable

    def updated(
        self, candidate: Exposure, stable: Exposure, exposed_odds: float, low_share: float, high_share: float
    ) -> Comparison:
        """`low_share` and `high_share` bracket the configured share: each test takes the end that errs safely.

        `exposed_odds`: candidate units per one of stable so far, which estimates go by. Mirrored questions may be left
        out, and an arm that fails is not judged: then it is not what was configured.
        """
        low_odds, high_odds = low_share / (1.0 - low_share), high_share / (1.0 - high_share)
        return Comparison(
            log_e=harm.updated(self.log_e, candidate.bad, stable.bad, high_share),
            upper=self.upper.updated(candidate.units, candidate.bad, stable.bad, low_odds),
            lower=self.lower.updated(stable.units, stable.bad, candidate.bad, 1.0 / high_odds),
            expected_bad=self.expected_bad + stable.bad * exposed_odds,
        )


@dataclass(frozen=True)
class Trial:
    """Everything known about the candidate under test."""

    pods: Pods = field(default_factory=dict)
    stages: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # conversations (candidate, stable)
    exposures: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # units (candidate, stable) per stage/metric
    comparisons: Mapping[Metric, Comparison] = field(default_factory=dict)
    harmful_served: int = 0  # tripped answers of the candidate that reached users
    reference: tuple[int, ...] = ()  # stable's latency histogram

    def samples(self, stage: int) -> int:
        """Candidate conversations counted in a stage."""
        return self.stages.get(stage, (0, 0))[0]

    def observed_share(self, stage: int) -> float | None:
        candidates, stables = self.stages.get(stage, (0, 0))
        return candidates / (candidates + stables) if candidates + stables else None

    def split_mismatch(self, stage: int, design: Design) -> bool:
        """Whether the counted split refutes the configured one. Shadowed traffic is not split."""
        candidates, stables = self.stages.get(stage, (0, 0))
        return not design.shadow and split.mismatch(candidates, stables, design.share)


def advanced(
    trial: Trial, new: Mapping[RowName, Counts], designs: Mapping[int, Design], within_limit: int = 0
) -> Trial:
    """The trial after new counts. Rows of stages without a design (another trial's, a hold's) are not evidence.
    ``within_limit``: so many latency buckets are never slow."""
    for stage in sorted({name.stage for name in new} & designs.keys()):
        candidate = new.get(RowName(stage, "canary"), Counts())
        stable = new.get(RowName(stage, "stable"), Counts())
        trial = _advanced_stage(trial, stage, designs[stage], candidate, stable, within_limit)
    return trial


def _advanced_stage(
    trial: Trial, stage: int, design: Design, candidate: Counts, stable: Counts, within_limit: int
) -> Trial:
    comparisons, exposures = dict(trial.comparisons), dict(trial.exposures)
    for metric, pair in _exposed(trial, candidate, stable, within_limit).items():
        key = f"{stage}/{metric}"
        before = exposures.get(key, (0, 0))
        total = (before[0] + pair[0].units, before[1] + pair[1].units)
        exposures[key] = total
        low, high = _bracket(design.share, total)
        odds = total[0] / max(1, total[1])  # without a unit of stable there is no bad one to weigh
        comparisons[metric] = comparisons.get(metric, Comparison()).updated(*pair, odds, low, high)
    counted = trial.stages.get(stage, (0, 0))
    return replace(
        trial,
        stages={
            **trial.stages,
            stage: (counted[0] + candidate.conversations, counted[1] + stable.conversations),
        },
        exposures=exposures,
        comparisons=comparisons,
        harmful_served=trial.harmful_served + candidate.harmful_served,
        reference=latency.remembered(trial.reference, stable.latency) if stable.latency else trial.reference,
    )


def _exposed(
    trial: Trial, candidate: Counts, stable: Counts, within_limit: int
) -> dict[Metric, tuple[Exposure, Exposure]]:
    """Units and bad ones of both arms, for each metric that these counts say something about."""
    pairs = {
        Metric.SAFETY: (Exposure(candidate.judged, candidate.violating), Exposure(stable.judged, stable.violating)),
        Metric.AVAILABILITY: (
            Exposure(candidate.conversations, candidate.failed),
            Exposure(stable.conversations, stable.failed),
        ),
    }
    first_slow = latency.threshold(trial.reference)  # from earlier counts only: the bet is fixed before the draw
    if first_slow is not None:
        first_slow = max(first_slow, within_limit)
        pairs[Metric.LATENCY] = (_slow(candidate, first_slow), _slow(stable, first_slow))
    return {metric: pair for metric, pair in pairs.items() if any((pair[0].units, pair[1].units))}


def _slow(counts: Counts, first_slow: int) -> Exposure:
    return Exposure(sum(counts.latency), latency.slow(counts.latency, first_slow))


def _bracket(configured: float, units: tuple[int, int]) -> tuple[float, float]:
    """An interval of shares that holds the configured one and the one observed in this stage so far.

    The tests hold exactly for the configured share; were the route wrong, the observed one takes over on the side
    that makes them slower, until the split test stops the trial.
    """
    observed = units[0] / sum(units)
    tiny = 1e-9
    return max(tiny, min(configured, observed)), min(1.0 - tiny, max(configured, observed))
