"""How often does a rollout err? Whole simulated rollouts through the shipped tests and the shipped stage rules.

    python -m benchmarks rollout_simulation      1,000 rollouts per row, some minutes on two cores
    ROLLOUTS=100 python -m benchmarks rollout_simulation

A rollout ramps over 1, 10 and 50 % of conversations and ends by a guardrail (abort), by promotion, or undecided after
its horizon. The counts of every pull go through `rlhf_operator.analysis`; the rules of a stage are those of the plan:
any guardrail that fails ends it, samples end a stage, and only a pass of every guardrail promotes.

Traffic comes in three kinds: conversations of one request; conversations of several requests whose outcomes depend on
each other (risky users, and answers that go on being bad once they are); and a base rate that swings and jumps. As a
negative control the dependent traffic is judged by requests in place of conversations, which must break the level.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from scipy import stats

from benchmarks.report import Report
from rlhf_operator.analysis.fold import Counts, RowName
from rlhf_operator.analysis.trial import Design, Metric, Trial, advanced
from rlhf_operator.analysis.verdict import failed, passed

Traffic = Literal["independent", "dependent", "drifting", "dependent, by request"]
Outcome = Literal["aborted", "promoted", "undecided"]

STAGES = ((1.0, 100), (10.0, 500), (50.0, 1000))  # weight in percent, candidate conversations
MARGINS = {Metric.SAFETY: 0.005, Metric.AVAILABILITY: 0.01, Metric.LATENCY: 0.05}
ALPHA = 0.01
ARRIVALS = 200  # conversations per pull
HORIZON = 400  # pulls
UNSAFE = 0.01  # stable's share of conversations with a violation
FAILED = 0.005
LATENCY = (0.6, 0.36, 0.03, 0.01)  # shares of the latency buckets
RISKY, RISKY_RATE, CALM_RATE = 0.2, 0.011, 0.0003  # dependent traffic: share of risky users, violations per request
GOES_ON = 0.75  # probability that a conversation has a further request
STAYS_BAD = 0.8  # probability that the request after a bad one is bad


@dataclass(frozen=True)
class Result:
    outcome: Outcome
    samples: int  # candidate conversations judged
    harmful: int  # bad conversations that the candidate served
    stage: int


@dataclass(frozen=True)
class Pull:
    """New counts of one arm."""

    conversations: int
    unsafe: int
    requests: int
    unsafe_requests: int


class Arms:
    """Conversations of both arms over time. `harm` multiplies the candidate's rate of violations."""

    def __init__(self, traffic: Traffic, harm: float, rng: np.random.Generator) -> None:
        self._traffic, self._harm, self._rng = traffic, harm, rng
        self._phase = rng.uniform(0, 2 * math.pi)
        self._share = 0.0
        # Dependent traffic: running conversations by arm and kind: (calm, risky, calm gone bad, risky gone bad).
        self._running = {"canary": np.zeros(4, int), "stable": np.zeros(4, int)}

    def pull(self, time: int, share: float) -> dict[str, Pull]:
        arriving = int(self._rng.poisson(ARRIVALS))
        canary = int(self._rng.binomial(arriving, share))
        new = {"canary": canary, "stable": arriving - canary}
        if not self._traffic.startswith("dependent"):
            return {arm: self._independent(arm, n, time) for arm, n in new.items()}
        carried = self._redrawn(share) if share != self._share else dict.fromkeys(new, 0)
        return {arm: self._dependent(arm, n, carried[arm]) for arm, n in new.items()}

    def _independent(self, arm: str, conversations: int, time: int) -> Pull:
        rate = UNSAFE
        if self._traffic == "drifting":
            rate *= (1.0 + 0.8 * math.sin(time / 15 + self._phase)) * (3.0 if 60 <= time < 120 else 1.0)
        unsafe = int(self._rng.binomial(conversations, min(1.0, rate * (self._harm if arm == "canary" else 1.0))))
        return Pull(conversations, unsafe, conversations, unsafe)

    def _redrawn(self, share: float) -> dict[str, int]:
        """A new weight moves conversations to the candidate; those that go on are counted once in the new stage."""
        moving = (share - self._share) / (1.0 - self._share)
        self._share = share
        moved = self._rng.binomial(self._running["stable"], moving)
        self._running["stable"] -= moved
        self._running["canary"] += moved
        for running in self._running.values():  # a conversation gone bad is no bad one of this stage yet
            running[:2] += running[2:]
            running[2:] = 0
        return {arm: int(running.sum()) for arm, running in self._running.items()}

    def _dependent(self, arm: str, fresh: int, carried: int) -> Pull:
        running, rng = self._running[arm], self._rng
        risky = int(rng.binomial(fresh, RISKY))
        running += np.array([fresh - risky, risky, 0, 0])
        factor = self._harm if arm == "canary" else 1.0
        bad = rng.binomial(running, [min(1, CALM_RATE * factor), min(1, RISKY_RATE * factor), STAYS_BAD, STAYS_BAD])
        requests = int(running.sum())
        running += np.array([-bad[0], -bad[1], bad[0], bad[1]])
        self._running[arm] = rng.binomial(running, GOES_ON)
        return Pull(fresh + carried, int(bad[:2].sum()), requests, int(bad.sum()))


def simulate(seed: int, traffic: Traffic, harm: float) -> Result:
    """One rollout."""
    rng = np.random.default_rng([seed, round(harm * 100)])
    arms, trial, stage = Arms(traffic, harm, rng), Trial(), 0
    designs = {index: Design(weight / 100.0) for index, (weight, _) in enumerate(STAGES)}
    harmful = 0
    for time in range(HORIZON):
        pulls = arms.pull(time, designs[stage].share)
        harmful += pulls["canary"].unsafe
        by_request = traffic == "dependent, by request"
        new = {RowName(stage, arm): _counts(rng, pull, by_request) for arm, pull in pulls.items()}
        trial = advanced(trial, new, designs)
        if any(failed(trial, metric, margin, ALPHA) for metric, margin in MARGINS.items()):
            return Result("aborted", _samples(trial), harmful, stage)
        if trial.samples(stage) < STAGES[stage][1] or trial.split_mismatch(stage, designs[stage]):
            continue
        if stage + 1 < len(STAGES):
            stage += 1
        elif all(passed(trial, metric, margin, ALPHA) for metric, margin in MARGINS.items()):
            return Result("promoted", _samples(trial), harmful, stage)
    return Result("undecided", _samples(trial), harmful, stage)


def _counts(rng: np.random.Generator, pull: Pull, by_request: bool) -> Counts:
    n, unsafe = (pull.requests, pull.unsafe_requests) if by_request else (pull.conversations, pull.unsafe)
    return Counts(
        conversations=n,
        failed=int(rng.binomial(n, FAILED)),
        judged=n,
        violating=unsafe,
        latency=tuple(int(count) for count in rng.multinomial(n, LATENCY)),
    )


def _samples(trial: Trial) -> int:
    return sum(candidates for candidates, _ in trial.stages.values())


def rollouts(count: int, traffic: Traffic, harm: float, workers: int) -> list[Result]:
    work = partial(simulate, traffic=traffic, harm=harm)
    if workers == 1:
        return [work(seed) for seed in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(work, range(count), chunksize=max(1, count // (8 * workers))))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    tail = (1.0 - level) / 2.0
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1.0 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def rows(results: list[Result], label: str, harm: float) -> Iterator[tuple[str, float, str, str]]:
    """name, value, unit, spread."""
    wrong: Outcome = "aborted" if harm == 1.0 else "promoted"
    right: Outcome = "promoted" if harm == 1.0 else "aborted"
    for name, outcome in ((f"false {_verb(wrong)}", wrong), (_verb(right), right), ("undecided", "undecided")):
        count = sum(result.outcome == outcome for result in results)
        low, high = clopper_pearson(count, len(results))
        yield f"{label}: {name}", count / len(results), "share", f"95% CI {low:.4f} to {high:.4f}"
    harmful = np.array([result.harmful for result in results])
    spread = f"median {np.median(harmful):.0f}, 90th percentile {np.quantile(harmful, 0.9):.0f}"
    yield f"{label}: harmful answers served per rollout", float(harmful.mean()), "conversations", spread
    samples = np.array([result.samples for result in results])
    spread = f"10th to 90th percentile {np.quantile(samples, 0.1):.0f} to {np.quantile(samples, 0.9):.0f}"
    yield f"{label}: candidate conversations until the end", float(np.median(samples)), "median", spread


def _verb(outcome: Outcome) -> str:
    return {"aborted": "abort", "promoted": "promotion", "undecided": "undecided"}[outcome]


KINDS: tuple[Traffic, ...] = ("independent", "dependent", "drifting")
HARMS = (1.0, 2.0, 5.0, 10.0)


def main() -> None:
    count = int(os.environ.get("ROLLOUTS", "1000"))
    workers = len(os.sched_getaffinity(0))
    report = Report("rollout_simulation", "Errors of simulated rollouts", packages=("numpy", "scipy"))
    for traffic in KINDS:
        for harm in HARMS:
            label = f"{traffic}, " + ("no harm" if harm == 1.0 else f"{harm:g}x harm")
            results = rollouts(count, traffic, harm, workers)
            for name, value, unit, spread in rows(results, label, harm):
                report.add(name, value, unit, samples=count, spread=spread)
                print(f"{name}: {value:.4g} {unit} ({spread})", file=sys.stderr, flush=True)
    control = rollouts(count, "dependent, by request", 1.0, workers)
    aborted = sum(result.outcome == "aborted" for result in control)
    low, high = clopper_pearson(aborted, count)
    name = "negative control, dependent traffic judged by requests, no harm: false abort"
    report.add(name, aborted / count, "share", samples=count, spread=f"95% CI {low:.4f} to {high:.4f}")
    report.note(
        f"Stages (percent, candidate conversations) {STAGES}; margins "
        + ", ".join(f"{metric} {margin:g}" for metric, margin in MARGINS.items())
        + f"; alpha {ALPHA:g} per guardrail, so at most {len(MARGINS) * ALPHA:g} false aborts per rollout by design; "
        f"{ARRIVALS} conversations per pull, at most {HORIZON} pulls; stable violates in {UNSAFE:.0%} of conversations."
    )
    report.note("Aims: false abort at most 5 %, false promotion at most 1 %. Harmful answers are the candidate's own.")
    report.write()


if __name__ == "__main__":
    main()
