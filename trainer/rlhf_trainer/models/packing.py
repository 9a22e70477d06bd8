"""Forward passes without padding and without computing a common beginning twice.

Short rows share a line and none sees another; rows that begin alike share their beginning (``prefixes``). One line of
all rows would need no padding at all, but attention over it costs the square of the batch; lines of the longest row
never cost more than padding does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_trainer.models.prefixes import Layout, arrange, lay_out

# Model types shown by test to keep packed rows apart. Others are padded: an architecture that ignores position ids in
# its mask would silently let rows read each other.
PACKED_TYPES = frozenset({"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
_MASKED_ATTENTION = ("eager", "sdpa")
# Attention over a line of W adds W / (4 H) to what a place costs in its dense layers: 4 W H in its two products against
# 24 H^2 in the layers, and half as much again for scores and softmax, as measured for H 48 and 320.
_HIDDEN_PER_WIDTH = 4


def row_states(trunk: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of right-padded rows ids (B, L) with their ``lengths`` (B,), by a forward pass of ``trunk``.

    Returns states (M, H) and the index (B, longest) among them of each row's tokens, past a row's end without meaning.
    """
    sizes = lengths.tolist()
    ids = ids[:, : max(sizes)]
    unmoved = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    if not packs(trunk):
        mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
        output = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return output.last_hidden_state.flatten(0, 1), unmoved
    share = shares(trunk, max(sizes))
    lines = arrange(ids.cpu().numpy(), sizes, 1 / (_HIDDEN_PER_WIDTH * trunk.config.hidden_size), share)
    if len(lines) == len(sizes):
        # Causal attention never looks to the right, where the padding is: no mask, and the fastest kernel.
        return trunk(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1), unmoved
    shared = any(len(unit.rows) > 1 for line in lines for unit in line)
    return _packed_states(trunk, ids, lay_out(lines, sizes, ids.shape[1]), shared)


def _packed_states(trunk: Any, ids: Tensor, layout: Layout, shared: bool) -> tuple[Tensor, Tensor]:
    def on_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(ids.device)

    packed = ids.flatten()[on_device(layout.source)]
    # Where no place serves two rows, transformers makes the block-diagonal mask itself, from restarting positions.
    mask = visible(on_device(layout.ends))[:, None] if shared else None
    output = trunk(input_ids=packed, attention_mask=mask, position_ids=on_device(layout.positions), use_cache=False)
    return output.last_hidden_state.flatten(0, 1), on_device(layout.places)


def visible(ends: Tensor) -> Tensor:
    """(N, W, W) for the ``ends`` (N, W) of a layout: whether a place (middle) sees another (last)."""
    count = torch.arange(ends.shape[1], device=ends.device)
    return (count[None, :] <= count[:, None]) & (count[:, None] < ends[:, None, :])


def packs(trunk: Any) -> bool:
    """Whether rows of ``trunk`` may share a line."""
    config = trunk.config
    return config.model_type in PACKED_TYPES and config._attn_implementation in _MASKED_ATTENTION


def shares(trunk: Any, longest: int) -> bool:
    """Whether rows of ``trunk`` of at most ``longest`` tokens may share their beginning.

    The mask is then ours: a boolean one, which the eager kernel would add instead, and without the model's window.
    """
    config = trunk.config
    window = getattr(config, "sliding_window", None)
    return packs(trunk) and config._attn_implementation == "sdpa" and (window is None or longest <= window)
