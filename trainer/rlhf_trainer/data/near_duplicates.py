"""Texts that are almost the same: MinHash proposes candidates, exact Jaccard similarity decides.

Shingles are pairs of neighbouring words, so that changing one word of a long text leaves it similar and changing one
word of a short one does not. 64 minima in 16 bands of 4 find a pair of similarity 0.8 with probability
1 - (1 - 0.8^4)^16 = 0.9998 (Broder 1997; Leskovec et al., "Mining of Massive Datasets", chapter 3).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from rlhf_trainer.data.text import encoded, words

THRESHOLD = 0.8
_BANDS, _ROWS = 16, 4
_PRIME = 4_294_967_311  # the first above 2^32: the product wraps often enough to mix
_BUCKET_LIMIT = 64  # beyond it, only neighbours in the bucket are compared: a bucket of thousands is one boilerplate

_rng = np.random.Generator(np.random.Philox(key=[0x5EED, 61]))
_MULTIPLY = _rng.integers(1, 1 << 31, _BANDS * _ROWS, dtype=np.uint64)
_ADD = _rng.integers(0, 1 << 31, _BANDS * _ROWS, dtype=np.uint64)


def shingles(text: str) -> frozenset[int]:
    """32-bit hashes of the text's word pairs (of its one word where there is only one, of its layout-free self where
    it has no words)."""
    found = words(text)
    grams = [" ".join(pair) for pair in pairwise(found)] or found or [" ".join(text.split())]
    return frozenset(int.from_bytes(hashlib.blake2b(encoded(gram), digest_size=4).digest(), "big") for gram in grams)


def jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """Index pairs (i < j) of distinct positions whose texts are at least ``threshold`` similar, sorted."""
    sets = [shingles(text) for text in texts]
    return sorted((i, j) for i, j in _candidates(sets) if jaccard(sets[i], sets[j]) >= threshold)


def clusters(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """Cluster number of each text: the smallest index of those it is connected with through near duplicates."""
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in near_duplicates(texts, threshold):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return [root(index) for index in range(len(texts))]


def _candidates(sets: Sequence[frozenset[int]]) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    buckets: dict[bytes, list[int]] = defaultdict(list)
    for index, signature in enumerate(_signatures(sets)):
        for band in range(_BANDS):
            rows = signature[band * _ROWS : (band + 1) * _ROWS]
            buckets[bytes([band]) + rows.tobytes()].append(index)
    for bucket in buckets.values():
        if len(bucket) <= _BUCKET_LIMIT:
            found.update(combinations(bucket, 2))
        else:
            found.update(pairwise(bucket))
            found.update((bucket[0], other) for other in bucket[1:])
    return found


def _signatures(sets: Sequence[frozenset[int]]) -> Iterator[npt.NDArray[np.uint64]]:
    """The minimum of each hash function a·x + b mod p over a set. Below 2^63: x and a have 32 and 31 bits."""
    for own in sets:
        values = np.fromiter(own, dtype=np.uint64, count=len(own))
        hashed = (values[:, None] * _MULTIPLY + _ADD) % _PRIME
        yield hashed.min(axis=0)
