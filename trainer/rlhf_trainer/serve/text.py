"""From tokens to text, piece by piece. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\ufffd"  # what an incomplete multi-byte character decodes to


class TextStream:
    """Turns tokens into the text they add. Decodes a short tail only, so a long answer costs linear time."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0  # start of the tail that is decoded again, because spaces depend on the token before
        self._emitted = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text this token adds; empty while a character is incomplete."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._emitted])
        after = self._decode(self._tokens[self._context :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._emitted = self._emitted, len(self._tokens)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end, complete or not."""
        before = self._decode(self._tokens[self._context : self._emitted])
        return self._decode(self._tokens[self._context :])[len(before) :]


class StopText:
    """Ends a text at the first stop string, and never gives out a piece that may turn out to be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to give out now."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
