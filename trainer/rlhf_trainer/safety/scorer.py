"""The builtin safety filter's format and scorer. numpy and the standard library only: the gateway runs it in line.

An answer is normalised (below), cut into overlapping windows, and each window scored by a linear model over the set of
its hashed character n-grams. The answer's score is that of its worst window, so that a harmful sentence cannot be
diluted by a long harmless one. The prompt is not looked at: the filter judges what a policy said.

Format (one JSON file, identified by its fileDigest):

    {"format": "rlhf.dev/safety-filter", "version": 1,
     "ngrams": [2, 5],              shortest and longest character n-gram
     "buckets": 65536,              hash buckets: crc32(n-gram in UTF-8) mod buckets
     "window": 160, "stride": 80,   in normalised characters
     "bias": -3.1, "threshold": 0.4,  an answer violates when its score (log-odds) reaches the threshold
     "weights": "…",                base64 of `buckets` little-endian float32
     "measured": {…}, "lineage": {…}} what `train` measured on held-out data, and the digest of the data
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "rlhf.dev/safety-filter"
VERSION = 1

# Letters of other scripts that pass for Latin ones, after casefolding.
_LOOKALIKES = str.maketrans("аеорсухіјѕԁһкмтνοαερι", "aeopcyxijsdhkmtvoaepi")
_LEET = str.maketrans({"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "@": "a", "$": "s"})
_LEET_INSIDE = re.compile(r"(?<=\w)[!|](?=\w)")
_SPELLED_OUT = re.compile(r"\b(?:[^\W\d_][\s.\-_*·]){3,}[^\W\d_]\b")
_SEPARATORS = re.compile(r"[\s.\-_*·]")
_STRETCHED = re.compile(r"([^\W\d_])\1+")
_NOT_WORD = re.compile(r"(?:[^\w#]|_)+")
_LETTER = re.compile(r"[^\W\d_]")


class FormatError(ValueError):
    """A file that is not a safety filter this version can read; the message says which file and what is wrong."""


def normalise(text: str) -> str:
    """One spelling for many: Unicode forms, case, accents, look-alikes, leet, letters set apart or doubled.

    Numbers keep only their length (``#``), because which digits they are does not generalise.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    bare = "".join(char for char in decomposed if unicodedata.category(char) not in ("Mn", "Cf"))
    folded = unicodedata.normalize("NFKC", bare.casefold()).translate(_LOOKALIKES)
    joined = _SPELLED_OUT.sub(lambda match: _SEPARATORS.sub("", match.group()), folded)
    words = " ".join(_unleet(token) for token in joined.split())
    return _NOT_WORD.sub(" ", _STRETCHED.sub(r"\1", words)).strip()


def _unleet(token: str) -> str:
    if _LETTER.search(token):
        return _LEET_INSIDE.sub("i", token).translate(_LEET)
    return re.sub(r"\d", "#", token)


def windows(normalised: str, length: int, stride: int) -> tuple[str, ...]:
    """Overlapping pieces that cover the text; a short text is one piece."""
    if len(normalised) <= length:
        return (normalised,)
    starts = range(0, len(normalised) - length + stride, stride)
    return tuple(normalised[start : start + length] for start in starts)


def buckets_of(window: str, ngrams: tuple[int, int], buckets: int) -> NDArray[np.int64]:
    """The sorted set of hash buckets that a window's n-grams fall into (words are fenced by spaces)."""
    fenced = f" {window} "
    shortest, longest = ngrams
    grams = {
        fenced[start : start + size]
        for size in range(shortest, longest + 1)
        for start in range(max(len(fenced) - size + 1, 0))
    }
    return np.unique(np.fromiter((zlib.crc32(gram.encode()) % buckets for gram in grams), dtype=np.int64))


@dataclass(frozen=True)
class LinearFilter:
    """A trained filter. `weights` has shape (buckets,), dtype float32; `bias` and `threshold` are log-odds."""

    weights: NDArray[np.float32]
    bias: float
    threshold: float
    ngrams: tuple[int, int] = (2, 5)
    window: int = 160
    stride: int = 80
    measured: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)

    def score(self, text: str) -> float:
        """Log-odds that the answer violates: that of its worst window."""
        pieces = windows(normalise(text), self.window, self.stride)
        return max(self.score_window(piece) for piece in pieces)

    def violates(self, text: str) -> bool:
        return self.score(text) >= self.threshold

    def score_window(self, window: str) -> float:
        """Log-odds of one window of normalised text."""
        hits = buckets_of(window, self.ngrams, len(self.weights))
        return self.bias + float(self.weights[hits].sum(dtype=np.float64))

    def to_json(self) -> str:
        """The file's text: deterministic, so that equal filters have equal digests."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "ngrams": list(self.ngrams),
            "buckets": len(self.weights),
            "window": self.window,
            "stride": self.stride,
            "bias": self.bias,
            "threshold": self.threshold,
            "measured": self.measured,
            "lineage": self.lineage,
            "weights": base64.b64encode(self.weights.astype("<f4").tobytes()).decode(),
        }
        return json.dumps(document, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> LinearFilter:
        """Read a filter file. Raises OSError when unreadable, FormatError when it is no such file."""
        try:
            return cls._from_document(json.loads(path.read_bytes()))
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise FormatError(
                f"{path} is not a safety filter of version {VERSION} ({error}): "
                "make one with `python -m rlhf_trainer.safety train`"
            ) from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> LinearFilter:
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        weights = np.frombuffer(base64.b64decode(document["weights"], validate=True), dtype="<f4").astype(np.float32)
        shortest, longest = (int(size) for size in document["ngrams"])
        window, stride = int(document["window"]), int(document["stride"])
        if len(weights) != document["buckets"] or not len(weights):
            raise ValueError(f"{len(weights)} weights for {document['buckets']} buckets")
        if not (1 <= shortest <= longest <= 16 and 1 <= stride <= window):
            raise ValueError(f"n-grams {shortest} to {longest}, window {window}, stride {stride}")
        bias, threshold = float(document["bias"]), float(document["threshold"])
        if not (np.isfinite(weights).all() and np.isfinite([bias, threshold]).all()):
            raise ValueError("a weight is not finite")
        return cls(
            weights, bias, threshold, (shortest, longest), window, stride, document["measured"], document["lineage"]
        )
