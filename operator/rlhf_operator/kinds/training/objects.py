"""Reading Kubernetes objects that may hold anything: a wrong type reads as absent, nothing here raises."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def dig(value: Any, *path: str) -> Any:
    """The value at a path of keys; None where it does not lead anywhere."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    found = dig(value, *path)
    return found if isinstance(found, Mapping) else {}


def mappings(value: Any, *path: str) -> tuple[Mapping[str, Any], ...]:
    """The mappings of the list at a path."""
    found = dig(value, *path)
    return tuple(item for item in found if isinstance(item, Mapping)) if isinstance(found, list | tuple) else ()


def text(value: Any, *path: str) -> str:
    found = dig(value, *path)
    return found if isinstance(found, str) else ""


def integer(value: Any, *path: str) -> int | None:
    found = dig(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def moment(value: Any, *path: str) -> datetime | None:
    """An RFC 3339 time, in UTC; one without a zone is taken as UTC."""
    try:
        return in_utc(datetime.fromisoformat(text(value, *path)))
    except (ValueError, OverflowError):
        return None


def in_utc(time: datetime) -> datetime:
    """Raises OverflowError at the ends of the calendar."""
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def later(time: datetime, seconds: float) -> datetime:
    """The time so many seconds later (or earlier), held at the ends of the calendar."""
    try:
        return time + timedelta(seconds=seconds)
    except OverflowError:
        return _LATEST if seconds > 0 else _EARLIEST


def condition(value: Any, type: str) -> Mapping[str, Any]:
    """status.conditions[type]; empty when it is not there."""
    return next((entry for entry in mappings(value, "status", "conditions") if entry.get("type") == type), {})


def is_true(value: Any, type: str) -> bool:
    return text(condition(value, type), "status") == "True"


def name_of(value: Any) -> str:
    return text(value, "metadata", "name")


def uid_of(value: Any) -> str:
    return text(value, "metadata", "uid")


def label_of(value: Any, label: str) -> str:
    return text(mapping(value, "metadata", "labels"), label)


def deleting(value: Any) -> bool:
    return bool(text(value, "metadata", "deletionTimestamp"))


def controller_uid(value: Any) -> str:
    owners = mappings(value, "metadata", "ownerReferences")
    return next((text(owner, "uid") for owner in owners if owner.get("controller") is True), "")
