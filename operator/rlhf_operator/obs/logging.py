"""JSON logs, one line per record, with the object and the pass that they are about.

The fields are bound by context variables, so that code deep inside needs to know nothing of them. A stack trace is
written once per distinct error; after that the line only counts it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

_FIELDS: ContextVar[dict[str, str] | None] = ContextVar("rlhf_operator_log_fields", default=None)
_REMEMBERED = 512


@contextlib.contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Every record logged inside carries `fields`."""
    token = _FIELDS.set({**(_FIELDS.get() or {}), **fields})
    try:
        yield
    finally:
        _FIELDS.reset(token)


class TraceOnce:
    """Remembers which errors have been shown in full."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, ...], int] = OrderedDict()

    def count(self, error: BaseException, trace: TracebackType | None) -> int:
        """How often this error was seen, this time included. The same type from the same lines is the same error."""
        frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(trace)]
        key = (type(error).__qualname__, *frames)
        self._seen[key] = self._seen.get(key, 0) + 1
        self._seen.move_to_end(key)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return self._seen[key]


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._traces = TraceOnce()

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_FIELDS.get() or {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            _, error, trace = record.exc_info
            count = self._traces.count(error, trace)
            fields["error"] = f"{type(error).__name__}: {error}"
            if count == 1:
                fields["trace"] = "".join(traceback.format_exception(error))
            else:
                fields["seen"] = count
        return fields


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record), ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """The same for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        head = f"{fields.pop('time')} {fields.pop('level'):<7} {fields.pop('message')}"
        trace = fields.pop("trace", "")
        tail = " ".join(f"{key}={value}" for key, value in fields.items())
        return f"{head}  {tail}" + (f"\n{trace.rstrip()}" if trace else "")


def configure(level: str, style: Literal["json", "text"]) -> None:
    """Sends everything to stderr. kopf's per-event lines are silenced: there is one for every watch event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("kopf.objects", "kopf.activities", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
