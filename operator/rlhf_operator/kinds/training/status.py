"""Reading back a status that anybody may have edited: what does not fit the model is dropped, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rlhf_operator.api.meta import ConditionStatus
from rlhf_operator.api.training_status import Attempt, TrainingJobStatus
from rlhf_operator.kinds.training.objects import mapping, mappings
from rlhf_trainer.wire import CheckpointRecord, Verdict

_LISTS: dict[str, type[BaseModel]] = {
    "conditions": ConditionStatus,
    "attempts": Attempt,
    "checkpoints": CheckpointRecord,
    "verdicts": Verdict,
}


def read_status(primary: Mapping[str, Any]) -> TrainingJobStatus:
    """The status as far as it can be believed; an empty one when nothing can."""
    raw = mapping(primary, "status")
    try:
        return _in_order(TrainingJobStatus.model_validate(raw))
    except ValidationError:
        return _in_order(_salvage(raw))


def _salvage(raw: Mapping[str, Any]) -> TrainingJobStatus:
    parts: dict[str, Any] = {}
    for name, value in raw.items():
        model = _LISTS.get(name)
        kept = [item for item in mappings(raw, name) if _fits(model, item)] if model else value
        if _fits(TrainingJobStatus, {name: kept}):
            parts[name] = kept
    return TrainingJobStatus.model_validate(parts)


def _fits(model: type[BaseModel], value: Mapping[str, Any]) -> bool:
    try:
        model.model_validate(value)
    except ValidationError:
        return False
    return True


def _in_order(status: TrainingJobStatus) -> TrainingJobStatus:
    """One entry per attempt number, ascending: the ledger's invariant, whatever was read."""
    unique = {attempt.number: attempt for attempt in status.attempts if attempt.number > 0}
    return status.model_copy(update={"attempts": [unique[number] for number in sorted(unique)]})
