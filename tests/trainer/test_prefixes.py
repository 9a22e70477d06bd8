"""Rows that begin alike: the layout against a trie by hand, and models that compute what they would row by row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_trainer.models import packing
from rlhf_trainer.models.packing import PACKED_TYPES, row_states, shares, visible
from rlhf_trainer.models.policy import Batch, score_tokens
from rlhf_trainer.models.prefixes import Unit, arrange, fill_lines, lay_out, sort_rows, units_within
from tests.trainer.test_logprobs import model_of

CPU = torch.device("cpu")
CHEAP = 1e-6  # of a place of width: only the number of places counts


def ids_of(rows: Sequence[Sequence[int]]) -> tuple[Any, list[int]]:
    width = max(len(row) for row in rows)
    return np.array([[*row, *[0] * (width - len(row))] for row in rows]), [len(row) for row in rows]


def alone(lengths: Sequence[int]) -> list[Unit]:
    return [Unit((row,), (0,), length) for row, length in enumerate(lengths)]


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_equal_lengths_with_nothing_in_common_get_a_line_each() -> None:
    ids, lengths = ids_of([[1, 5, 6], [2, 5, 6], [3, 5, 6]])
    assert [[unit.rows for unit in line] for line in arrange(ids, lengths, CHEAP)] == [[(0,)], [(1,)], [(2,)]]


@pytest.mark.parametrize("seed", range(3))
def test_lines_hold_every_row_once_and_are_no_longer_than_the_longest(seed: int) -> None:
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = fill_lines(alone(lengths))
    assert sorted(unit.rows[0] for line in lines for unit in line) == list(range(200))
    assert max(sum(unit.length for unit in line) for line in lines) == max(lengths)
    assert len(lines) * max(lengths) < 1.06 * sum(lengths)


# ---- the trie ------------------------------------------------------------------------------------------------------

# Two replies to one prompt, one of them twice, a row under the same system prompt (1 7), and a stranger.
ROWS = [[1, 7, 4, 4, 9], [2, 8, 3], [1, 7, 4, 4, 5, 6], [1, 7, 3], [1, 7, 4, 4, 9]]


def test_rows_are_sorted_so_that_beginnings_lie_together() -> None:
    order, common = sort_rows(*ids_of(ROWS))
    assert [ROWS[row] for row in order] == sorted(ROWS)
    assert common == [0, 2, 4, 5, 0]


def test_places_are_the_nodes_of_the_trie() -> None:
    ids, lengths = ids_of(ROWS)
    lines = arrange(ids, lengths, CHEAP)
    layout = lay_out(lines, lengths, ids.shape[1])
    prefixes = {tuple(row[: end + 1]) for row in ROWS for end in range(len(row))}
    assert sum(unit.length for line in lines for unit in line) == len(prefixes)
    for row, place in ((row, layout.places[index, : len(row)]) for index, row in enumerate(ROWS)):
        assert [int(ids.flatten()[layout.source.flatten()[at]]) for at in place] == row
        assert layout.positions.flatten()[place].tolist() == list(range(len(row)))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_beginning_and_nothing_else(seed: int) -> None:
    """Random tries of three words, so that beginnings coincide at every depth."""
    rng = random.Random(seed)
    rows = [[rng.randrange(1, 4) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 14))]
    ids, lengths = ids_of(rows)
    order, common = sort_rows(ids, lengths)
    for lines in (arrange(ids, lengths, CHEAP), fill_lines(units_within(order, common, lengths, rng.randint(9, 40)))):
        layout = lay_out(lines, lengths, ids.shape[1])
        width, mask = layout.source.shape[1], visible(torch.from_numpy(layout.ends)).numpy()
        assert sorted(row for line in lines for unit in line for row in unit.rows) == list(range(len(rows)))
        for index, row in enumerate(rows):
            path = layout.places[index, : len(row)]
            for depth, place in enumerate(path):
                seen = np.flatnonzero(mask[place // width, place % width]) + place // width * width
                assert seen.tolist() == path[: depth + 1].tolist()
        assert mask.any(axis=2).all(), "a place that sees nothing would be not a number"


def test_wide_lines_are_weighed_against_what_they_save() -> None:
    """Eight replies to one prompt, as long as the prompt: together where attention is cheap, apart where it is dear."""
    rows = [[*range(100, 132), *range(200 + 40 * reply, 232 + 40 * reply)] for reply in range(8)]
    ids, lengths = ids_of(rows)

    def per_line(width_cost: float) -> list[int]:
        return sorted({len(unit.rows) for line in arrange(ids, lengths, width_cost) for unit in line})

    assert per_line(CHEAP) == [8]
    assert per_line(1 / 200) == [2]
    assert per_line(1.0) == [1]
    assert [len(line) for line in arrange(ids, lengths, CHEAP, share=False)] == [1] * 8


# ---- models --------------------------------------------------------------------------------------------------------


def grouped() -> Batch:
    """Three prompts, three replies each, one reply twice."""
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 40) for _ in range(size))] for size in (5, 9, 2)]
    replies = [[rng.randrange(3, 40) for _ in range(size)] for size in (3, 5, 2, 7, 1, 4, 6, 2)]
    return Batch.of([prompts[row % 3] for row in range(9)], [*replies, replies[5]], 0, CPU)


def logprobs_and_gradients(lm: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    logprobs = score_tokens(lm, batch, 1.0).logprobs
    upstream = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    return logprobs.detach(), list(torch.autograd.grad((logprobs * upstream).sum(), list(lm.parameters())))


@pytest.mark.parametrize("model_type", sorted(PACKED_TYPES))
def test_sharing_changes_neither_values_nor_gradients(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, batch = model_of(model_type), grouped()
    assert shares(lm.base_model, 16)
    states, _ = row_states(lm.base_model, batch.ids, batch.prompt_lengths + batch.lengths)
    assert len(states) < int((batch.prompt_lengths + batch.lengths).sum()), "fewer places than tokens"
    shared, own = logprobs_and_gradients(lm, batch)
    monkeypatch.setattr(packing, "shares", lambda *_: False)
    apart, expected = logprobs_and_gradients(lm, batch)
    torch.testing.assert_close(shared, apart, atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(own, expected, strict=True):
        scale = float(theirs.abs().max()) or 1.0
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=0)


def test_a_reply_that_sees_another_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a mask that is merely causal lets the second reply read the first."""
    lm, batch = model_of("llama"), grouped()
    expected, _ = logprobs_and_gradients(lm, batch)
    monkeypatch.setattr(packing, "visible", lambda ends: visible(torch.full_like(ends, ends.shape[1])))
    mixed, _ = logprobs_and_gradients(lm, batch)
    assert (mixed - expected).abs().max() > 0.1


def test_places_left_over_have_no_positions_beyond_the_longest_row() -> None:
    """Of gpt2 they would be rows that its table of positions has not; of others, a reason to scale rotations anew."""
    groups = [(40, 6), (8, 2)]  # a wide line, and one that is nearly empty
    rows = [[*range(100 * at, 100 * at + prompt), *[10_000 + 10 * reply + at] * 8]
            for at, (prompt, replies) in enumerate(groups) for reply in range(replies)]  # fmt: skip
    ids, lengths = ids_of(rows)
    layout = lay_out(arrange(ids, lengths, CHEAP), lengths, ids.shape[1])
    assert layout.source.shape == (2, 88)
    assert layout.positions.max() == max(lengths) - 1


def test_rows_beyond_a_sliding_window_do_not_share() -> None:
    lm = model_of("mistral")
    lm.config.sliding_window = 8
    assert shares(lm.base_model, 8)
    assert not shares(lm.base_model, 9)
    assert not shares(model_of("llama", "eager").base_model, 8)
