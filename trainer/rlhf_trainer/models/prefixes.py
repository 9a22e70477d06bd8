"""Rows that begin alike, laid out so that what they share is computed once.

A token's state depends on the tokens before it and on nothing else, so the samples of a prompt, a chosen and a rejected
reply, or rows under one system prompt need their common beginning only once; gradients add up in it. Rows in
lexicographic order are a trie walked depth first, and there the ancestors of a place are the places before it whose
subtree has not ended: one number a place says the whole attention mask.

A line that holds a whole group is longer than any of its rows, and attention pays for length. ``arrange`` weighs the
two and may share in part or not at all. Related: Hydragen (Juravsky et al. 2024) for decoding, Prefix Grouper (Liu et
al. 2025) for one prompt per group.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

# A shorter common beginning is not worth its bookkeeping: this share of the shorter row, at least.
_WORTH_SHARING = 1 / 8
_MASK_COST = 0.08  # of making a mask and attending by it, in dense layers; 5 to 12 % measured
_MASK_NUMBERS = 2**27  # lines x width^2, of which kernels keep a copy in the type of the weights
# Lines tried, in lengths of the longest row.
_WIDTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Unit:
    """Rows on one line side by side, in lexicographic order. ``shared[k]`` tokens of row k are those of row k - 1."""

    rows: tuple[int, ...]
    shared: tuple[int, ...]
    length: int  # places it takes


@dataclass(frozen=True)
class Layout:
    """Where the tokens of rows (B, L) lie on lines (N, W)."""

    source: Integers  # (N, W) index of the place's token among all of (B, L)
    positions: Integers  # (N, W) position in its row; 0 where no token lies, so that such a place sees itself alone
    ends: Integers  # (N, W) place on the line before which its descendants end
    places: Integers  # (B, L) of each token among all of (N, W); past a row's end without meaning


def arrange(ids: Integers, lengths: Sequence[int], width_cost: float, share: bool = True) -> list[list[Unit]]:
    """Units by line for rows ids (B, L), the cheapest found: every row on a line of its own, rows packed on lines of
    the longest row, or with common beginnings shared on lines of several widths.

    ``width_cost`` of attention per place and place of width, where dense layers cost 1 per place.
    """
    alone = [Unit((row,), (0,), length) for row, length in enumerate(lengths)]
    best: list[list[Unit]] = [[unit] for unit in alone]
    cheapest = max(lengths) * len(lengths) * (1.0 + width_cost * max(lengths))  # causal attention needs no mask
    for units in [alone, *(_joined(ids, lengths) if share else ())]:
        width = max(unit.length for unit in units)
        price = 1.0 + _MASK_COST + width_cost * width
        if sum(unit.length for unit in units) * price >= cheapest:
            continue  # even without a place left over
        lines = fill_lines(units)
        cost = len(lines) * width * price
        if cost < cheapest and len(lines) * width**2 <= _MASK_NUMBERS:
            best, cheapest = lines, cost
    return best


def _joined(ids: Integers, lengths: Sequence[int]) -> Iterator[list[Unit]]:
    """Units of ever more rows with a common beginning."""
    order, common = sort_rows(ids, lengths)
    longest, whole = max(lengths), units_within(order, common, lengths, sum(lengths))
    most = max(unit.length for unit in whole)
    for factor in _WIDTHS:
        if longest * factor < most:
            yield units_within(order, common, lengths, int(longest * factor))
    if len(whole) < len(lengths):
        yield whole


def sort_rows(ids: Integers, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows in an order in which equal beginnings lie together, and how many tokens each shares with the one before."""
    keys = [row[:length].tobytes() for row, length in zip(ids, lengths, strict=True)]
    order = sorted(range(len(keys)), key=lambda row: (keys[row], row))
    common = [0]
    for before, row in pairwise(order):
        both = min(lengths[before], lengths[row])
        differs = ids[before, :both] != ids[row, :both]
        common.append(int(differs.argmax()) if differs.any() else both)
    return order, common


def units_within(order: Sequence[int], common: Sequence[int], lengths: Sequence[int], width: int) -> list[Unit]:
    """Neighbours in ``order`` joined as long as sharing is worth it and they fit ``width``."""
    units: list[Unit] = []
    rows: list[int] = []
    shared: list[int] = []
    length = 0
    for at, row in enumerate(order):
        more = lengths[row] - common[at]
        if rows and not (_worth(common[at], lengths[rows[-1]], lengths[row]) and length + more <= width):
            units.append(Unit(tuple(rows), tuple(shared), length))
            rows, shared, length = [], [], 0
        shared.append(common[at] if rows else 0)
        length += more if rows else lengths[row]
        rows.append(row)
    return [*units, Unit(tuple(rows), tuple(shared), length)]


def _worth(common: int, one: int, other: int) -> bool:
    return common > 1 and common >= _WORTH_SHARING * min(one, other)


def fill_lines(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units by line, no line longer than the longest unit: longest first, each into the fullest line it fits."""
    capacity = max(unit.length for unit in units)
    lines: list[list[Unit]] = []
    room: list[tuple[int, int]] = []  # (free, line), ascending
    for unit in sorted(units, key=lambda unit: (-unit.length, unit.rows[0])):
        at = bisect_left(room, (unit.length, -1))
        if at < len(room):
            free, line = room.pop(at)
            lines[line].append(unit)
        else:
            free, line = capacity, len(lines)
            lines.append([unit])
        insort(room, (free - unit.length, line))
    return lines


def lay_out(lines: Sequence[Sequence[Unit]], lengths: Sequence[int], stride: int) -> Layout:
    """The layout of ``lines`` for rows stored ``stride`` apart."""
    width = max(sum(unit.length for unit in line) for line in lines)
    count = np.arange(max(width, stride))
    source = np.zeros((len(lines), width), dtype=np.int64)
    positions, ends = np.zeros_like(source), np.full_like(source, width)
    places = np.zeros((len(lengths), stride), dtype=np.int64)
    for index, line in enumerate(lines):
        at, path = 0, count[:0]  # the next free place, and the places of the last row's tokens
        for row, shared in ((row, shared) for unit in line for row, shared in zip(unit.rows, unit.shared, strict=True)):
            own, tokens = slice(at, at + lengths[row] - shared), count[shared : lengths[row]]
            ends[index, path[shared:]] = at
            path = np.concatenate([path[:shared], count[own]])
            source[index, own], positions[index, own] = row * stride + tokens, tokens
            places[row, : len(path)] = index * width + path
            at = own.stop
        ends[index, path] = at
    return Layout(source, positions, ends, places)
