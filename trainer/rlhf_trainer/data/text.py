"""What makes two texts the same: the normal form behind identities, duplicates and the holdout."""

from __future__ import annotations

import re
import unicodedata

# Scripts written without spaces: every character is a word of its own.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normal(text: str) -> str:
    """NFC, one space between words: what differs only in layout is the same text."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """Case-folded words without punctuation (NFKC); one per character in scripts that do not use spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def encoded(text: str) -> bytes:
    """UTF-8 of any text JSON can hold, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


def utf8(text: str) -> bytes:
    """UTF-8 that every reader takes: half a surrogate pair is written as JSON escapes it."""
    return text.encode("utf-8", "backslashreplace")
