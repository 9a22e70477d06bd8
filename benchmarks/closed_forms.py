"""Every algorithm against the optimum that pen and paper give, and beside it the mistakes that must miss it.

The bandit is played through a real language model by the very targets and losses the trainer uses: KL(pi‖pi*) of the
policy it ends with. A control is a mistake that a library has shipped, or a part left out; it must stay far away.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import Report
from rlhf_trainer.algos.kl import k1, k3
from rlhf_trainer.config import Cost
from tests.trainer import test_lagrangian as lagrangian
from tests.trainer.bandit import BETA, log_policy, play, training_of
from tests.trainer.test_bandit_optimum import ALGORITHMS
from tests.trainer.test_preference_losses import distance_after_dpo

NEAR, FAR = 0.01, 0.05  # nats: what the tests ask of an algorithm, and of a control


@dataclass(frozen=True)
class Line:
    what: str
    error: Callable[[], float]
    control: bool = False


def bandit(name: str, **changes: Any) -> float:
    return play(training_of(**ALGORITHMS[name], **changes)).distance()


def as_a_loss(name: str, estimator: Callable[..., Any]) -> float:
    training = training_of(**ALGORITHMS[name], kl={"coefficient": 0.0})
    return play(training, extra=lambda p, q: BETA * estimator(p, q)).distance()


def saddle_point() -> float:
    _, best = lagrangian.optimum(Cost.SAFETY)
    training = training_of(algorithm="PPO", constraints=[lagrangian.constraint(Cost.SAFETY)])
    policy = log_policy(play(training, costs=lagrangian.COSTS).policy)
    return float((policy.exp() * (policy - best)).sum())


def multiplier_error() -> float:
    exact, _ = lagrangian.optimum(Cost.SAFETY)
    training = training_of(algorithm="PPO", constraints=[lagrangian.constraint(Cost.SAFETY)])
    found = play(training, costs=lagrangian.COSTS).constraints.multipliers
    return abs(found[Cost.SAFETY] - exact[Cost.SAFETY])


def unconstrained() -> float:
    _, best = lagrangian.optimum(Cost.SAFETY)
    policy = log_policy(play(training_of(algorithm="RLOO"), costs=lagrangian.COSTS).policy)
    return float((policy.exp() * (policy - best)).sum())


def in_loss(name: str, estimator: str) -> Callable[[], float]:
    return lambda: bandit(name, kl={"placement": "loss", "estimator": estimator})


LINES = (
    *(Line(f"{name}, KL in the reward (k1)", lambda name=name: bandit(name)) for name in ALGORITHMS),  # type: ignore[misc]
    *(
        Line(f"{name}, {kl} in the loss", in_loss(name, kl))
        for name in ("PPO", "GRPO-none", "RLOO")
        for kl in ("k2", "k3")
    ),
    Line("k1 minimised as a loss", lambda: as_a_loss("PPO", k1), control=True),
    Line("k3 minimised as a loss, not importance-weighted", lambda: as_a_loss("PPO", k3), control=True),
    Line("RLOO without its KL", lambda: bandit("RLOO", kl={"coefficient": 0.0}), control=True),
    Line("DPO on 40,000 Bradley-Terry pairs", distance_after_dpo),
    Line("DPO without its reference", lambda: distance_after_dpo(anchored=False), control=True),
    Line("DPO with another beta", lambda: distance_after_dpo(beta=0.2), control=True),
    Line("PPO-Lagrangian, policy at the saddle point", saddle_point),
    Line("PPO-Lagrangian, |lambda - lambda*|", multiplier_error),
    Line("without the constraint", unconstrained, control=True),
)


def main() -> int:
    torch.set_num_threads(1)
    report = Report("closed_forms", "Algorithms against their closed forms", ("torch", "transformers"))
    missed = []
    for line in LINES:
        began = time.monotonic()
        error = line.error()
        seconds = time.monotonic() - began
        kind = "control, must miss" if line.control else "must reach"
        report.add(f"{line.what} ({kind})", error, "nats", samples=1, spread=f"{seconds:.1f} s")
        if error < FAR if line.control else error > 2 * NEAR:
            missed.append(line.what)
    report.note(
        "KL(policy‖optimum); lambda's row is an absolute difference. The spread column is the wall time of the row."
    )
    report.write()
    print("\n".join(f"not as it must be: {what}" for what in missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
