"""The holdout by clusters of prompts, and the near duplicates it rests on."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_trainer.data.documents import parse_document
from rlhf_trainer.data.importing import Options, prepare
from rlhf_trainer.data.near_duplicates import clusters, jaccard, near_duplicates, shingles
from rlhf_trainer.data.rows import load_preferences
from rlhf_trainer.data.split import HOLDOUT, QUARANTINE, TRAIN, assign, held_out, split

VOCABULARY = [f"word{index}" for index in range(200)]


def sentence(rng: random.Random, length: int) -> list[str]:
    return rng.choices(VOCABULARY, k=length)


def families(count: int, seed: int) -> list[list[str]]:
    """Prompts of 30 words, each with two versions that differ in the last word."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        base = sentence(rng, 30)
        found.append([" ".join([*base[:-1], rng.choice(VOCABULARY) + end]) for end in ("", "x", "y")])
    return found


def test_jaccard_similarity_is_that_of_the_word_pairs() -> None:
    one, other = shingles("a b c d"), shingles("A b, c e!")
    assert jaccard(one, other) == 2 / 4
    assert jaccard(one, one) == 1.0
    assert jaccard(shingles("x"), shingles("X.")) == 1.0


def test_candidates_miss_nothing_that_is_similar() -> None:
    """Against all pairs, for texts whose similarities spread around the threshold."""
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        base = sentence(rng, 40)
        texts.append(" ".join(base))
        for changes in (1, 2, 3, 4, 6):
            edited = list(base)
            for at in rng.sample(range(40), changes):
                edited[at] = rng.choice(VOCABULARY)
            texts.append(" ".join(edited))
    sets = [shingles(text) for text in texts]
    every = sorted((i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= 0.8)
    assert len(every) > 60
    assert near_duplicates(texts) == every


def test_many_copies_of_one_text_are_one_cluster_in_linear_time() -> None:
    assert set(clusters(["the same words again"] * 3000)) == {0}


@pytest.mark.parametrize("text", ["", " ", "?!", "東京", "\ud800"])
def test_any_text_has_shingles(text: str) -> None:
    assert shingles(text)


def test_near_duplicates_are_on_one_side() -> None:
    groups = families(300, seed=1)
    sides = assign([prompt for group in groups for prompt in group], 0.2)
    assert all(len({sides[prompt] for prompt in group}) == 1 for group in groups)
    share = sum(sides[group[0]] == HOLDOUT for group in groups) / len(groups)
    assert share == pytest.approx(0.2, abs=0.06)
    # The control: by their own hashes the members of a family part.
    assert any(len({held_out(prompt, 0.2) for prompt in group}) == 2 for group in groups)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
def test_sides_do_not_depend_on_order(seed: int, order: random.Random) -> None:
    prompts = [prompt for group in families(12, seed) for prompt in group]
    shuffled = list(prompts)
    order.shuffle(shuffled)
    assert assign(prompts, 0.3) == assign(shuffled, 0.3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_prompt_ever_changes_its_side(seed: int) -> None:
    """Three versions, each with more members of the same families: with the earlier sides pinned nobody moves."""
    groups = families(15, seed)
    known: dict[str, str] = {}
    for size in (1, 2, 3):
        prompts = [prompt for group in groups for prompt in group[:size]]
        sides = assign(prompts, 0.3, known)
        assert all(sides[prompt] == side for prompt, side in known.items())
        known |= sides
    assert all(len({known[prompt] for prompt in group}) == 1 for group in groups)


def test_without_the_earlier_version_some_would_move() -> None:
    """The control of stickiness: a cluster's side can change when members join, so the earlier sides are needed."""
    groups = families(200, seed=2)
    first = assign([group[0] for group in groups], 0.3)
    later = assign([prompt for group in groups for prompt in group], 0.3)
    assert any(later[prompt] != side for prompt, side in first.items())


def test_a_prompt_between_both_sides_is_on_neither() -> None:
    base = [f"w{index}" for index in range(24)]
    left, bridge, right = (" ".join([*base[:20], *end]) for end in (["l", "m"], ["m"], ["m", "r", "s"]))
    assert jaccard(shingles(left), shingles(bridge)) >= 0.8
    assert jaccard(shingles(right), shingles(bridge)) >= 0.8
    sides = assign([left, bridge, right], 0.2, {left: TRAIN, right: "audit"})
    assert sides == {left: TRAIN, bridge: QUARANTINE, right: HOLDOUT}
    training, holdout = split([left, bridge, right], str, 0.2, {left: TRAIN, right: "audit", bridge: None}.get)
    assert (training, holdout) == ([left], [right])


def test_a_side_that_was_given_is_kept_whatever_the_hash_says() -> None:
    prompts = [f"question number {index} of many" for index in range(100)]
    turned = {prompt: TRAIN if held_out(prompt, 0.5) else HOLDOUT for prompt in prompts}
    assert assign(prompts, 0.5, turned) == turned


@pytest.mark.parametrize("rows", [(HOLDOUT, TRAIN), (TRAIN, HOLDOUT), ("val", TRAIN, HOLDOUT)])
def test_a_prompt_that_rows_put_on_both_sides_is_on_neither_in_any_order(rows: tuple[str, ...]) -> None:
    """The last row used to win, so that what an earlier one holds out was trained on."""
    spelled = [("Hello  there" if index else "hello there", side) for index, side in enumerate(rows)]
    assert split(spelled, lambda row: row[0], 0.2, side_of=lambda row: row[1]) == ([], [])
    same = [("hello there", side) for side in rows]
    assert split(same, lambda row: row[0], 0.2, side_of=lambda row: row[1]) == ([], [])
    agreed = [("hello there", "val"), ("hello there", "audit")]
    assert split(agreed, lambda row: row[0], 0.2, side_of=lambda row: row[1]) == ([], agreed)


def test_training_keeps_the_side_that_a_row_names(tmp_path: Path) -> None:
    """The column of an earlier version wins over the hash, so that a holdout stays one; rows without it are hashed."""
    rows = [
        {"prompt": f"question {index} about {word}", "response_a": "yes", "response_b": "no", "preference": "a"}
        for index, word in enumerate(("rain", "music", "boats", "glass", "bread", "stone", "paper", "light"))
    ]
    sides = ["holdout", "train"] * 4
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "split": side}) + "\n" for row, side in zip(rows, sides, strict=True)))
    read = load_preferences(path)
    train, holdout = split(read, lambda row: row.prompt, 0.2, side_of=lambda row: row.side)
    assert [row.prompt for row in train] == [row["prompt"] for row in rows[1::2]]
    assert [row.prompt for row in holdout] == [row["prompt"] for row in rows[::2]]


def test_an_empty_column_says_nothing_about_the_side() -> None:
    """What a table without sides is exported as: the hash decides, as where there is no column."""
    rows = [
        {"prompt": f"{word} of {index}", "response_a": "yes", "response_b": "no", "preference": "a"}
        for index, word in enumerate(VOCABULARY[:60])
    ]
    plain, empty = (
        prepare(parse_document("rows.jsonl", json.dumps(given).encode()), Options())
        for given in (rows, [row | {"split": ""} for row in rows])
    )
    assert {row["split"] for row in plain.rows} == {TRAIN, HOLDOUT}
    assert [row["split"] for row in empty.rows] == [row["split"] for row in plain.rows]
