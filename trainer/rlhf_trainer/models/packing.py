"""Padding-free forward passes: short rows share a line, none sees another.

Rows are laid on lines as long as the longest of them, best fit first. Position ids start again with every row, from
which transformers makes a block-diagonal causal mask. One line of all rows would need no padding at all, but attention
over it costs the square of the batch; lines of the longest row never cost more than padding does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Model types shown by test to keep packed rows apart. Others are padded: an architecture that ignores position ids in
# its mask would silently let rows read each other.
PACKED_TYPES = frozenset({"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
_MASKED_ATTENTION = ("eager", "sdpa")


def row_states(trunk: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of right-padded rows ids (B, L) with their ``lengths`` (B,), by a forward pass of ``trunk``.

    Returns states (M, H) and the index (B,) among them of each row's first token; its others follow.
    """
    if not packs(trunk):
        mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
        output = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return output.last_hidden_state.flatten(0, 1), torch.arange(len(ids), device=ids.device) * ids.shape[1]
    sizes = lengths.tolist()
    lines = fill_lines(sizes)
    if len(lines) == len(sizes):
        # Causal attention never looks to the right, where the padding is: no mask, and the fastest kernel.
        ids = ids[:, : max(sizes)]
        states = trunk(input_ids=ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1), torch.arange(len(ids), device=ids.device) * ids.shape[1]
    source, positions, starts = _layout(lines, sizes, ids.shape[1])
    packed = ids.flatten()[torch.from_numpy(source).to(ids.device)]
    output = trunk(input_ids=packed, position_ids=torch.from_numpy(positions).to(ids.device), use_cache=False)
    return output.last_hidden_state.flatten(0, 1), torch.from_numpy(starts).to(ids.device)


def packs(trunk: Any) -> bool:
    """Whether rows of ``trunk`` may share a line."""
    config = trunk.config
    return config.model_type in PACKED_TYPES and config._attn_implementation in _MASKED_ATTENTION


def fill_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by line, no line longer than the longest row: longest row first, each into the fullest line it fits."""
    capacity = max(lengths)
    lines: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, line), ascending
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(room, (lengths[row], -1))
        if at < len(room):
            free, line = room.pop(at)
            lines[line].append(row)
        else:
            free, line = capacity, len(lines)
            lines.append([row])
        insort(room, (free - lengths[row], line))
    return lines


def _layout(
    lines: Sequence[Sequence[int]], lengths: Sequence[int], stride: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For rows stored ``stride`` apart: source index and position id (lines, W) of every place, start (B,) of rows."""
    width = max(lengths)
    source = np.zeros((len(lines), width), dtype=np.int64)
    positions = np.zeros_like(source)
    starts = np.zeros(len(lengths), dtype=np.int64)
    count = np.arange(width)
    for line, rows in enumerate(lines):
        at = 0
        for row in rows:
            end = at + lengths[row]
            source[line, at:end] = row * stride + count[: lengths[row]]
            positions[line, at:end] = count[: lengths[row]]
            starts[row] = line * width + at
            at = end
        positions[line, at:] = count[: width - at]  # what is left over is a row of its own, read by nobody
    return source, positions, starts
