"""Personal data with a structure: found by pattern and checksum, replaced by typed placeholders such as <EMAIL_1>.

Names and postal addresses have no structure and are not found; who needs that adds a detector of named entities. A
value gets the same placeholder everywhere in a record, so that a dialogue stays readable.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_trainer.data.annotation import COLUMNS
from rlhf_trainer.data.text import encoded

Check = Callable[[str], bool]

_PSEUDONYM = re.compile(r"rater-[0-9a-f]{16}")
_ENTROPY_BITS = 3.5  # per character: random base64 of 32 characters has about 4.5, words about 3
TEXT_COLUMNS = ("prompt", "response_a", "response_b")
_NO_TEXT = COLUMNS - set(TEXT_COLUMNS)  # of the contract; a column of the user's own may say anything


@dataclass(frozen=True)
class Span:
    start: int
    end: int
    kind: str


def find(text: str) -> list[Span]:
    """Personal data in a text, left to right, without overlaps: earlier kinds of the table win."""
    taken: list[Span] = []
    free = [(0, len(text))]  # an earlier kind ends the text for later ones
    for kind, pattern, check in _DETECTORS:
        fresh = [Span(*found, kind) for start, end in free for found in _matches(pattern, check, text, start, end)]
        if fresh:
            taken = sorted([*taken, *fresh], key=lambda span: span.start)
            edges = [0, *(edge for span in taken for edge in (span.start, span.end)), len(text)]
            free = list(zip(edges[::2], edges[1::2], strict=True))
    return taken


def _matches(pattern: re.Pattern[str], check: Check, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the pattern matches and the check holds. What stands beside a number may look like a group of it (a card's
    expiry, "BIC" after an account): a match whose checksum fails is tried without its last groups, then its first."""
    while match := pattern.search(text, start, end):
        at, stops, following = match.start(), [match.end()], match.end()
        if check in _CHECKSUMS:
            stops += [place for place in range(match.end() - 1, at, -1) if text[place] in " -"]
            following = at + 1
        stop = next((stop for stop in stops if check(text[at:stop])), None)
        if stop is not None:
            yield at, stop
        start = following if stop is None else stop


class Redactor:
    """Replaces personal data in the texts of one record; ``counts`` says how much of each kind."""

    def __init__(self) -> None:
        self._placeholders: dict[tuple[str, str], str] = {}
        self._numbers: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def text(self, text: str) -> str:
        parts, at = [], 0
        for span in find(text):
            parts += [text[at : span.start], self._placeholder(span.kind, text[span.start : span.end])]
            at = span.end
        return "".join([*parts, text[at:]])

    def value(self, value: Any) -> Any:
        """A text, or all texts of lists and objects: messages, and what users put into columns of their own."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(part) for part in value]
        if isinstance(value, dict):
            return {key: self.value(part) for key, part in value.items()}
        return value

    def _placeholder(self, kind: str, value: str) -> str:
        self.counts[kind] += 1
        key = kind, re.sub(r"[\s().-]", "", value).casefold()
        if key not in self._placeholders:
            self._numbers[kind] += 1
            self._placeholders[key] = f"<{kind}_{self._numbers[kind]}>"
        return self._placeholders[key]


def redact_row(row: dict[str, Any]) -> tuple[dict[str, Any], Counter[str]]:
    """The row with its texts redacted, and how many values of each kind were replaced."""
    redactor = Redactor()
    clean = {key: value if key in _NO_TEXT else redactor.value(value) for key, value in row.items()}
    return clean, redactor.counts


def kinds_in(row: Mapping[str, Any]) -> set[str]:
    """The kinds that ``redact_row`` would replace."""
    texts = _texts([value for key, value in row.items() if key not in _NO_TEXT])
    return {span.kind for text in texts for span in find(text)}


def _texts(value: Any) -> Iterator[str]:
    """Every text of lists and objects, however deep."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, list | dict):
            left += part.values() if isinstance(part, dict) else part


def pseudonym(rater_id: str, key: bytes) -> str:
    """``rater-<16 hex digits>`` of HMAC-SHA256: the same person under the same key, nobody without it.

    Deleting the key makes the identities unrecoverable. A pseudonym stays as it is.
    """
    if _PSEUDONYM.fullmatch(rater_id):
        return rater_id
    return f"rater-{hmac.new(key, encoded(rater_id), hashlib.sha256).hexdigest()[:16]}"


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _luhn(text: str) -> bool:
    """ISO/IEC 7812: every second digit from the right doubled, digits summed, divisible by ten."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [digit if at % 2 == 0 else sum(divmod(2 * digit, 10)) for at, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: letters as numbers, first four characters last, remainder 1 modulo 97."""
    packed = re.sub(r"[\s-]", "", text).upper()
    moved = packed[4:] + packed[:4]
    return 15 <= len(packed) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


_CHECKSUMS: tuple[Check, ...] = (_luhn, _iban)


def _address(text: str) -> bool:
    """An IP address that names a host: not loopback, unspecified, or a reserved block."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved)


def _phone(text: str) -> bool:
    digits = _digits(text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


def _spanish_id(text: str) -> bool:
    packed = text.replace("-", "").upper().translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(packed[:8]) % 23] == text[-1].upper()


def _secret(text: str) -> bool:
    """A token with small and capital letters and digits, and as random as a key."""
    kinds = (str.islower, str.isupper, str.isdigit)
    counts = Counter(text)
    entropy = -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
    return all(any(map(kind, text)) for kind in kinds) and entropy > _ENTROPY_BITS


def _always(_text: str) -> bool:
    return True


def _table() -> Iterator[tuple[str, re.Pattern[str], Check]]:
    edge, no_edge = r"(?<![\w.+-])", r"(?![\w-])"
    yield "SECRET", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]+?-----END [A-Z ]*PRIVATE KEY-----"), _always
    yield "SECRET", re.compile(r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"), _always
    yield "SECRET", re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), _always
    yield "SECRET", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b"), _always
    yield "EMAIL", re.compile(r"[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,62}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"), _always
    yield (
        "IBAN",
        re.compile(rf"{edge}[A-Z]{{2}}\d{{2}}(?:[ -]?[A-Z0-9]{{4}}){{2,7}}(?:[ -]?[A-Z0-9]{{1,3}})?{no_edge}"),
        _iban,
    )
    yield "IBAN", re.compile(rf"{edge}[A-Za-z]{{2}}\d{{2}}[A-Za-z0-9]{{11,30}}{no_edge}"), _iban
    yield "CARD", re.compile(rf"{edge}(?<![A-Z]{{2}}\d\d )(?!20\d\d)[2-6]\d{{3}}(?:[ -]?\d){{9,15}}{no_edge}"), _luhn
    yield "IP", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"), _address
    yield "IP", re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?<=:):?)(?![\w:])"), _address
    yield "NATIONAL_ID", re.compile(rf"{edge}(?!000|666|9\d\d)\d{{3}}-(?!00)\d\d-(?!0000)\d{{4}}{no_edge}"), _always
    yield "NATIONAL_ID", re.compile(rf"{edge}[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]{no_edge}"), _always  # fmt: skip  # noqa: E501
    yield "NATIONAL_ID", re.compile(rf"{edge}[XYZxyz0-9]\d{{7}}-?[A-Za-z]{no_edge}"), _spanish_id
    yield "PHONE", re.compile(r"(?<![\w+.-])(?:\+|00)[1-9](?:[ ./-]{0,2}(?:\(\d{1,4}\)|\d)){7,14}(?![\w-])"), _phone
    yield "PHONE", re.compile(rf"{edge}(?:\(0\d{{1,4}}\)|0\d{{1,4}})[ /-](?:[ /-]?\d){{5,9}}{no_edge}"), _phone
    yield "PHONE", re.compile(rf"{edge}(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{{4}}(?:x\d{{1,5}})?{no_edge}"), _phone  # fmt: skip  # noqa: E501
    yield "SECRET", re.compile(r"(?<![\w/+=-])[A-Za-z0-9_/+-]{32,256}={0,2}(?![\w/+-])"), _secret


_DETECTORS = tuple(_table())
KINDS = tuple(dict.fromkeys(kind for kind, _, _ in _DETECTORS))
