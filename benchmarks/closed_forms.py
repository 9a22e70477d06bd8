"""Every algorithm against what pen and paper give, and beside it the mistakes that must miss it.

The bandit is played through a real language model by the very targets and losses the trainer uses: KL(pi‖pi*) of the
policy it ends with. A control is a mistake that a library has shipped, or a part left out; it must stay far away.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report
from rlhf_trainer.algos.advantages import group_relative, leave_one_out
from rlhf_trainer.algos.kl import k1, k3
from rlhf_trainer.config import DPO, Cost
from rlhf_trainer.distributed import join
from tests.trainer import test_lagrangian as lagrangian
from tests.trainer import test_preference_losses as preference
from tests.trainer.bandit import BETA, Played, log_policy, play, training_of
from tests.trainer.closed_forms import gae_error, recovery
from tests.trainer.test_advantages import turned
from tests.trainer.test_bandit_optimum import ALGORITHMS
from tests.trainer.test_distillation import EVERY as DIVERGENCES
from tests.trainer.test_distillation import distance_of_student
from tests.trainer.test_preference_losses import distance_after_dpo
from tests.trainer.training_world import make_tiny_world

NEAR, FAR = 0.01, 0.05  # nats: what the tests ask of an algorithm, and of a control


@dataclass(frozen=True)
class Line:
    """``near``: what is still reached; ``far``: what a control must exceed."""

    what: str
    error: Callable[[], float]
    control: bool = False
    unit: str = "nats"
    near: float = 2 * NEAR
    far: float = FAR


def bandit(name: str, **changes: Any) -> float:
    return play(training_of(**ALGORITHMS[name], **changes)).distance()


def as_a_loss(name: str, estimator: Callable[..., Any]) -> float:
    training = training_of(**ALGORITHMS[name], kl={"coefficient": 0.0})
    return play(training, extra=lambda p, q: BETA * estimator(p, q)).distance()


def constrained(algorithm: str, *costs: Cost) -> Played:
    training = training_of(algorithm=algorithm, constraints=[lagrangian.constraint(cost) for cost in costs])
    return play(training, costs=lagrangian.COSTS)


def saddle_point(algorithm: str, *costs: Cost) -> float:
    """KL to the best policy within the limits of ``costs``."""
    _, best = lagrangian.optimum(*costs)
    policy = log_policy(constrained(algorithm, *costs).policy)
    return float((policy.exp() * (policy - best)).sum())


def multiplier_error(algorithm: str, *costs: Cost) -> float:
    exact, _ = lagrangian.optimum(*costs)
    found = constrained(algorithm, *costs).constraints.multipliers
    return max(abs(found[cost] - exact[cost]) for cost in costs)


def unconstrained() -> float:
    _, best = lagrangian.optimum(Cost.SAFETY)
    policy = log_policy(play(training_of(algorithm="RLOO"), costs=lagrangian.COSTS).policy)
    return float((policy.exp() * (policy - best)).sum())


def off_its_optimum(dpo: DPO) -> float:
    return preference.distance(preference.trained(dpo, steps=100), preference.own_optimum(dpo))


def off_the_ceiling(steps: int, shuffled: bool) -> float:
    """What held-out accuracy lacks to what the labels' noise allows."""
    with tempfile.TemporaryDirectory() as folder:
        base = make_tiny_world(Path(folder)).base
        reached, ceiling = recovery(base, join(timedelta(seconds=60)), steps, shuffled)
    return abs(ceiling - reached)


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
    Line("cDPO on the same pairs, its own optimum", lambda: off_its_optimum(preference.CDPO)),
    Line("IPO on the same pairs, its own optimum", lambda: off_its_optimum(preference.IPO)),
    Line("PPO-Lagrangian, policy at the saddle point", lambda: saddle_point("PPO", Cost.SAFETY)),
    Line("PPO-Lagrangian, lambda against lambda*", lambda: multiplier_error("PPO", Cost.SAFETY), unit="reward"),
    Line(
        "RLOO with two binding constraints, policy at the saddle point", lambda: saddle_point("RLOO", *lagrangian.COSTS)
    ),
    Line(
        "RLOO with two binding constraints, lambda against lambda*",
        lambda: multiplier_error("RLOO", *lagrangian.COSTS),
        unit="reward",
    ),
    Line("without the constraint", unconstrained, control=True),
    *(
        Line(f"distillation of a table, {name} divergence", lambda name=name: distance_of_student(name))  # type: ignore[misc]
        for name in DIVERGENCES
    ),
    Line("the student before it learns", lambda: distance_of_student("forward", steps=0), control=True),
    Line(
        "Bradley-Terry: accuracy against the ceiling of noise",
        lambda: off_the_ceiling(60, False),
        unit="share",
        near=0.07,
    ),
    Line("labels without a signal", lambda: off_the_ceiling(15, True), control=True, unit="share", far=0.1),
    Line("RLOO over all groups of three against the exact gradient", lambda: turned(leave_one_out), unit="1 - cosine"),
    Line("divided by the group's deviation", lambda: turned(group_relative), control=True, unit="1 - cosine"),
    Line("GAE against its double sum", lambda: gae_error(1.0, 0.95), unit="reward", near=1e-12),
    Line("GAE with lambda 0.9 for 0.95", lambda: gae_error(1.0, 0.95, taken=0.9), control=True, unit="reward"),
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
        report.add(f"{line.what} ({kind})", error, line.unit, samples=1, spread=f"{seconds:.1f} s")
        if error < line.far if line.control else error > line.near:
            missed.append(line.what)
    report.note(
        "Nats: KL(policy‖optimum), of students KL(teacher‖student); reward and share: largest absolute difference. The "
        "spread column is the wall time of the row."
    )
    report.write()
    print("\n".join(f"not as it must be: {what}" for what in missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
