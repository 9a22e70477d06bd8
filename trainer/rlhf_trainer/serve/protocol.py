"""The OpenAI wire format, as far as it is served: requests are checked, and refused with what to do instead."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Endpoint = Literal["completions", "chat"]
FinishReason = Literal["stop", "length"]


class RequestError(ValueError):
    """A request that cannot be served. `status` and `code` as OpenAI clients know them."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def error_body(error: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


class _Lenient(BaseModel):
    # Clients send many optional fields; those that would change the answer are refused below, the rest is ignored.
    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(_Lenient):
    include_usage: bool = False


class _Common(_Lenient):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Common):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]


class Message(_Lenient):
    role: str
    content: str


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


# What would change the answer if it were honoured, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "top_p": (1, 1.0, None), "top_k": (-1, 0, None), "min_p": (0, 0.0, None), "best_of": (1, None),
    "presence_penalty": (0, 0.0, None), "frequency_penalty": (0, 0.0, None), "repetition_penalty": (1, 1.0, None),
    "logit_bias": ({}, None), "logprobs": (False, None), "top_logprobs": (0, None), "echo": (False, None),
    "suffix": ("", None), "tools": ([], None), "functions": ([], None), "response_format": ({"type": "text"}, None),
}  # fmt: skip


def parse(endpoint: Endpoint, body: bytes) -> CompletionRequest | ChatRequest:
    """Check a request body. Raises RequestError."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}. Send a JSON object.") from error
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can escape it, and no tokenizer takes it
        raise RequestError(
            "The JSON holds half of a surrogate pair, which is no character: send whole ones."
        ) from error
    if not isinstance(document, dict):
        raise RequestError("The body must be a JSON object.")
    for name, neutral in _UNSUPPORTED.items():
        if name in document and document[name] not in neutral:
            raise RequestError(f"{name} is not supported by this server: leave it out.", code="unsupported_parameter")
    try:
        return (CompletionRequest if endpoint == "completions" else ChatRequest).model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{place}: {first['msg']}.") from error


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def to_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Envelope:
    """Builds the documents of one answer: whole, or chunk by chunk."""

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint: Endpoint = endpoint
        self._model = model
        self._id = ("cmpl-" if endpoint == "completions" else "chatcmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"text": text} if self._endpoint == "completions" else {"message": {"role": "assistant", "content": text}}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._document([choice], chunk=False) | {"usage": usage.to_dict()}

    def opening(self) -> dict[str, Any] | None:
        """The chunk that names the role, in a chat."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._endpoint == "chat" else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"text": text} if self._endpoint == "completions" else {"delta": {"content": text}}, None)

    def closing(self, reason: FinishReason) -> dict[str, Any]:
        return self._chunk({"text": ""} if self._endpoint == "completions" else {"delta": {}}, reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, when stream_options.include_usage asks for it."""
        return self._document([], chunk=True) | {"usage": usage.to_dict()}

    def _chunk(self, content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return self._document([{"index": 0, **content, "logprobs": None, "finish_reason": reason}], chunk=True)

    def _document(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        if self._endpoint == "completions":
            kind = "text_completion"
        else:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
