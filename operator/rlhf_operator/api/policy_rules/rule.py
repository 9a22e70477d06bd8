"""One rule, said twice, and how rules speak of algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_operator.api.meta import Cel
from rlhf_trainer.config import Algorithm

if TYPE_CHECKING:
    from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec


@dataclass(frozen=True)
class Rule:
    """The same statement in CEL (of `self`, the spec) and in Python; `message` says what to do."""

    cel: str
    holds: Callable[[PolicyOptimizationJobSpec], bool]
    message: str
    at: str = ""  # the field that the server's error names, such as ".training.kl"

    def to_cel(self) -> Cel:
        return Cel(self.cel, self.message, field_path=self.at)


def names(algorithms: Iterable[Algorithm]) -> str:
    """In the order in which the enum lists them."""
    found = [algorithm.value for algorithm in Algorithm if algorithm in set(algorithms)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def one_of(algorithms: Iterable[Algorithm]) -> str:
    """In CEL: the spec's algorithm is among these."""
    return f"self.training.algorithm in {[a.value for a in Algorithm if a in set(algorithms)]!r}"
