"""The state of a trial -> one guardrail's answer, with what is missing for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_operator.analysis import harm
from rlhf_operator.analysis.trial import Comparison, Design, Metric, Trial
from rlhf_trainer.wire import VerdictState

_MAX_E = 1e12  # larger ones are not more convincing, and JSON readers overflow

_WHAT = {
    Metric.SAFETY: "conversations with a safety violation",
    Metric.AVAILABILITY: "conversations with a failed answer",
    Metric.LATENCY: "conversations slower than stable's 95th percentile",
}


@dataclass(frozen=True)
class Judgement:
    """One guardrail's answer. Rates are shares of conversations; differences are candidate minus stable."""

    metric: Metric
    state: VerdictState
    n: int
    margin: float
    bound: float  # the e-value at which it fails: 1/alpha
    test: str
    message: str
    candidate_rate: float | None = None
    stable_rate: float | None = None
    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    e_value: float | None = None
    needed: int | None = None  # further candidate conversations until Pass at the rates seen; None: not reachable


def judge(
    trial: Trial, metric: Metric, margin: float, alpha: float, design: Design, limit: str | None = None
) -> Judgement:
    """What the trial says about one guardrail. Fail when worse is shown, unless worse by less than the margin is.
    ``limit``: the promised latency, in words."""
    comparison = trial.comparisons.get(metric, Comparison())
    n = comparison.upper.units
    odds = design.share / (1.0 - design.share)
    if n == 0:
        return _without_data(trial, metric, margin, alpha, odds)
    rate, stable_rate = comparison.upper.bad / n, comparison.expected_bad / n
    log_e = harm.log_e_value(comparison.log_e)
    passes = comparison.upper.excludes(margin, alpha)
    state = VerdictState.NEED_MORE_DATA
    if passes:
        state = VerdictState.PASS
    elif log_e >= -math.log(alpha):
        state = VerdictState.FAIL
    judgement = Judgement(
        metric=metric,
        state=state,
        n=n,
        margin=margin,
        bound=1.0 / alpha,
        test="betting confidence sequence" if passes else "conditional binomial e-process",
        message="",
        candidate_rate=rate,
        stable_rate=stable_rate,
        estimate=rate - stable_rate,
        lower=-comparison.lower.bound(alpha),
        upper=comparison.upper.bound(alpha),
        e_value=min(_MAX_E, math.exp(min(log_e, 700.0))),
        needed=0 if passes else comparison.upper.needed(margin, alpha, rate, stable_rate, odds),
    )
    return _with_message(judgement, _WHAT[metric] + (f" and than {limit}" if limit is not None else ""))


def failed(trial: Trial, metric: Metric, margin: float, alpha: float) -> bool:
    """Whether `judge` would say Fail; cheap."""
    comparison = trial.comparisons.get(metric)
    return (
        comparison is not None
        and harm.log_e_value(comparison.log_e) >= -math.log(alpha)
        and not comparison.upper.excludes(margin, alpha)
    )


def passed(trial: Trial, metric: Metric, margin: float, alpha: float) -> bool:
    """Whether `judge` would say Pass; cheap."""
    comparison = trial.comparisons.get(metric)
    return comparison is not None and comparison.upper.units > 0 and comparison.upper.excludes(margin, alpha)


def _without_data(trial: Trial, metric: Metric, margin: float, alpha: float, odds: float) -> Judgement:
    unjudged = metric is Metric.SAFETY and any(sum(pair) for pair in trial.stages.values())
    needed = Comparison().upper.needed(margin, alpha, 0.0, 0.0, odds)
    return Judgement(
        metric=metric,
        state=VerdictState.UNKNOWN if unjudged else VerdictState.NEED_MORE_DATA,
        n=0,
        margin=margin,
        bound=1.0 / alpha,
        test="conditional binomial e-process",
        message="no answer was judged by the safety filter"
        if unjudged
        else f"no candidate conversation was counted yet; {needed} without a bad one would show the margin",
        needed=needed,
    )


def _with_message(judgement: Judgement, what: str) -> Judgement:
    rates = (
        f"{what}: candidate {_percent(judgement.candidate_rate)} of {judgement.n}, "
        f"stable {_percent(judgement.stable_rate)}"
    )
    if judgement.state is VerdictState.FAIL:
        verdict = (
            f"the candidate is worse: e-value {judgement.e_value:.4g} of the {judgement.test} reached "
            f"{judgement.bound:.4g}"
        )
    elif judgement.state is VerdictState.PASS:
        verdict = f"worse by at most {_percent(judgement.upper)} (margin {_percent(judgement.margin)})"
    elif judgement.needed is None:
        verdict = f"at these rates the margin {_percent(judgement.margin)} cannot be shown"
    else:
        verdict = f"{judgement.needed} further candidate conversations to show the margin {_percent(judgement.margin)}"
    return replace(judgement, message=f"{rates}; {verdict}")


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100.0 * value:.3g} %"
