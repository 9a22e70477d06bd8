"""The little of the OpenAI wire format that the gateway must understand. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

EVENT_STREAM = "text/event-stream"


def error_body(message: str, kind: str, code: str) -> dict[str, Any]:
    """An error as OpenAI clients expect it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(message: str, kind: str, code: str) -> bytes:
    """The same inside a stream that has begun: clients raise on it instead of taking a cut answer for a whole one."""
    return b"data: " + json.dumps(error_body(message, kind, code)).encode() + b"\n\n"


def answers(content_type: str, body: bytes) -> tuple[str, ...]:
    """The texts a policy produced, one per choice and channel, from a whole JSON body or a whole event stream.

    Empty when the body is not a completion (a model list, an error): there is nothing to judge then.
    """
    if content_type.startswith(EVENT_STREAM):
        documents = list(_events(body))
    else:
        documents = [document for document in (_parse(body),) if document is not None]
    texts: dict[tuple[int, str], list[str]] = {}
    for document in documents:
        for channel, piece in _pieces(document):
            texts.setdefault(channel, []).append(piece)
    return tuple("".join(pieces) for _, pieces in sorted(texts.items()))


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        if line.startswith(b"data:") and (document := _parse(line[5:].strip())) is not None:
            yield document


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _pieces(document: dict[str, Any]) -> Iterator[tuple[tuple[int, str], str]]:
    choices = document.get("choices")
    for place, choice in enumerate(choices if isinstance(choices, list) else ()):
        if not isinstance(choice, dict):
            continue
        index = choice.get("index", place)
        holder = choice.get("message") or choice.get("delta") or choice
        for name, piece in _channels(holder) if isinstance(holder, dict) else ():
            if isinstance(piece, str):
                yield (index if isinstance(index, int) else place, name), piece


def _channels(holder: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """What a user, or a user's tool, gets to see. Servers differ in how they call a policy's reasoning."""
    for name in ("content", "text", "reasoning_content", "reasoning", "refusal"):
        yield name, holder.get(name)
    calls = holder.get("tool_calls")
    for place, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield f"tool_calls/{call.get('index', place)}", function.get("arguments")
