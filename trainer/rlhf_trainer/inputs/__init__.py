"""What an attempt reads, by the fields that name it, and whether it is what was pinned. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_trainer.digests import (
    DigestMismatchError,
    RowError,
    check_digest,
    dataset_digest,
    file_digest,
    folder_digest,
)
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import AttemptConfig, Located


@dataclass(frozen=True)
class Input:
    field: str  # below spec
    located: Located
    digest: Callable[[Path], str]

    @property
    def shown(self) -> str:
        return f"spec.{self.field} ({self.located.uri or self.located.path})"

    @property
    def is_stored(self) -> bool:
        """In an object store: its path is where the launcher brings it."""
        return (self.located.uri or "").startswith("s3://")

    def check(self) -> None:
        """Raises Invalid unless it can be read and hashes to what is pinned."""
        place = "object" if self.is_stored else "path and the mounted claim"
        try:
            actual = self.digest(Path(self.located.path))
        except RowError as error:
            raise Invalid(f"spec.{self.field}: {error}") from error
        except (OSError, ValueError) as error:
            raise Invalid(f"{self.shown}: {error}; check the {place}") from error
        if self.located.digest is None:
            return
        try:
            check_digest(actual, self.located.digest, self.shown)
        except DigestMismatchError as error:
            raise Invalid(str(error), reason="DigestMismatch") from error


def inputs_of(config: AttemptConfig) -> tuple[Input, ...]:
    """Models first, which are folders; datasets are files of rows, the safety filter is one file."""
    named: tuple[tuple[str, Located | None, Callable[[Path], str]], ...] = (
        ("baseModel", config.base_model, folder_digest),
        ("policy", config.policy, folder_digest),
        ("rewardModel", config.reward_model, folder_digest),
        ("auditRewardModel", config.audit_reward_model, folder_digest),
        ("teacher", config.teacher, folder_digest),
        ("preferences", config.preferences, dataset_digest),
        ("validation.humanScores", config.human_scores, dataset_digest),
        ("prompts", config.prompts, dataset_digest),
        ("demonstrations", config.demonstrations, dataset_digest),
        ("evaluation.safetyFilter", config.safety_filter, file_digest),
        ("evaluation.safetySuite", config.safety_suite, dataset_digest),
    )
    return tuple(Input(field, located, digest) for field, located, digest in named if located is not None)


def as_written(text: str, config: AttemptConfig) -> str:
    """A message with the URIs that the user wrote in place of paths in the pod, which say nothing outside of it."""
    found = [each.located for each in inputs_of(config)]
    for located in sorted(found, key=lambda located: len(located.path), reverse=True):
        if located.uri is not None:
            text = text.replace(located.path, located.uri)
    return text
