"""Rows, holdout and order: bad input is named, nothing leaks, everything resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_trainer.data.encoding import Encoder, pad_right
from rlhf_trainer.data.rows import load_preferences, load_prompts, load_scores
from rlhf_trainer.data.sampler import Position, Sampler
from rlhf_trainer.data.split import held_out, split
from rlhf_trainer.desk.model import build_tokenizer
from rlhf_trainer.digests import dataset_digest, rows_digest
from rlhf_trainer.exits import Invalid

USER = {"role": "user", "content": "p"}
GOOD: dict[str, Any] = {"prompt": "p", "response_a": "x", "response_b": "y", "preference": "a"}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_preferences_are_read_in_order_with_unknown_columns_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        GOOD | {"rater_id": "r1", "is_gold": False},
        "",
        GOOD | {"preference": "b"},
        GOOD | {"preference": "tie"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
    )
    rows = load_preferences(path)
    assert [row.probability_a for row in rows] == [1.0, 0.0, 0.5, 1.0]
    assert (rows[3].response_a, rows[3].response_b) == ("good", "bad")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD | {"preference": "c"}, "field 'preference' is 'c', not one of a, b, tie"),
        (GOOD | {"preference": None}, "field 'preference' is None"),
        (GOOD | {"preference": ["a"]}, "field 'preference' is ['a']"),
        ({k: v for k, v in GOOD.items() if k != "prompt"}, "field 'prompt' is missing"),
        (GOOD | {"prompt": "  "}, "field 'prompt' is empty"),
        (GOOD | {"response_a": ""}, "field 'response_a' is empty"),
        (GOOD | {"response_a": "half a smile: \ud83d"}, "field 'response_a' holds half of a surrogate pair"),
        (GOOD | {"response_b": 3}, "field 'response_b' is int, not a text"),
        (GOOD | {"response_b": " x "}, "'response_a' and 'response_b' are the same text"),
        ({"prompt": "p", "chosen": "x"}, "field 'rejected' is missing"),
        # As published: the dialogue again in both sides, which would be learnt as what the assistant says.
        (
            {"prompt": "p"} | {side: [USER, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
            "field 'chosen' has turns of user; a response holds the assistant's turns alone",
        ),
        ("[1, 2]", "a JSON list; each line must be one JSON object"),
        ("{not json", "not JSON"),
    ],
)
def test_a_bad_preference_is_named_by_file_line_and_field(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, line)
    with pytest.raises(Invalid) as refused:
        load_preferences(path)
    assert f"{path}:2: " in refused.value.message
    assert says in refused.value.message


def test_many_bad_rows_are_counted_and_only_some_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *[GOOD | {"preference": "?"}] * 12)
    with pytest.raises(Invalid, match="and 7 more rows"):
        load_preferences(path)


@pytest.mark.parametrize("score", [None, "3", True, float("nan"), float("inf")])
def test_a_score_must_be_a_finite_number(tmp_path: Path, score: Any) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "p", "response": "r", "score": score})
    with pytest.raises(Invalid, match="give a finite number"):
        load_scores(path)


def test_an_empty_or_missing_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no rows"):
        load_prompts(write(tmp_path / "empty.jsonl"))
    with pytest.raises(Invalid, match="cannot be read"):
        load_prompts(tmp_path / "absent.jsonl")


def test_bytes_that_are_not_text_are_refused_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(Invalid, match=":1: not JSON"):
        load_prompts(path)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """As `data validate` takes it, and says which digest to pin."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(load_preferences(path)) == 1
    assert dataset_digest(path) == rows_digest([GOOD])


def test_prompts_given_twice_count_once(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"})
    assert load_prompts(path) == ["b", "a"]


def test_the_holdout_hangs_on_the_prompt_alone() -> None:
    prompts = [f"question {index}" for index in range(4000)]
    train, holdout = split(prompts, lambda text: text, 0.2)
    assert abs(len(holdout) / len(prompts) - 0.2) < 0.02
    assert not set(train) & set(holdout)
    again, _ = split(reversed([*prompts, "new one"]), lambda text: text, 0.2)
    assert set(again) - {"new one"} == set(train)
    assert held_out("Question  7", 0.2) == held_out("question 7", 0.2)


def test_a_larger_holdout_contains_the_smaller() -> None:
    prompts = [f"question {index}" for index in range(500)]
    assert all(held_out(text, 0.4) for text in prompts if held_out(text, 0.1))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_a_sampler_resumes_exactly_and_covers_every_epoch(size: int, counts: list[int], cut: int) -> None:
    whole = Sampler(size, Position(seed=3))
    taken = [whole.take(count) for count in counts]
    flat = [row for batch in taken for row in batch]
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size))
    cut = min(cut, len(counts) - 1)
    first = Sampler(size, Position(seed=3))
    for count in counts[:cut]:
        first.take(count)
    assert [Sampler(size, first.position).take(counts[cut])] == [taken[cut]]
    computed = Position.after(sum(counts[:cut]), size, seed=3)
    assert Sampler(size, computed).take(counts[cut]) == taken[cut]


def test_epochs_and_seeds_have_their_own_orders() -> None:
    sampler = Sampler(50, Position(seed=0))
    first, second = sampler.take(50), sampler.take(50)
    assert first != second
    assert Sampler(50, Position(seed=1)).take(50) != first


def test_a_position_outside_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="the data has changed"):
        Sampler(10, Position(seed=0, epoch=0, offset=11))


def test_a_pair_is_prompt_response_and_one_end() -> None:
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    ids = encoder.pair("hello my parcel is late be warm", "we will check your parcel .")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == encoder.eos_id
    assert encoder.decode(ids[8:]) == "we will check your parcel ."


def test_texts_in_one_go_are_the_texts_one_by_one() -> None:
    encoder = Encoder(build_tokenizer())
    prompts, responses = ["hello my parcel is late", "hello", ""], ["we will check .", "", "sorry . sorry ."]
    expected = [encoder.pair(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    assert encoder.pairs(prompts, responses) == expected
    assert encoder.pairs([], []) == []
    with pytest.raises(ValueError, match="3 prompts and 1 responses"):
        encoder.pairs(prompts, ["one"])


def test_a_response_that_writes_its_end_out_ends_once() -> None:
    """No policy writes a second end, and a reward would be read off a state that no reply has."""
    encoder = Encoder(build_tokenizer())
    assert encoder.response("glad <eos>") == encoder.response("glad")
    assert encoder.pairs(["hello"] * 2, ["glad <eos>", "glad"]) == [encoder.pair("hello", "glad")] * 2


def test_a_tokenizer_whose_pad_is_its_eos_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(Invalid, match="pad token is its eos token"):
        Encoder(tokenizer)


def test_masks_come_from_lengths_even_where_pad_is_a_real_token() -> None:
    ids, mask = pad_right([[0, 0, 5], [0]], pad_id=0)
    assert torch.equal(ids, torch.tensor([[0, 0, 5], [0, 0, 0]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
