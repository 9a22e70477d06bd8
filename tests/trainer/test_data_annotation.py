"""The annotation record: what is valid, what identifies it, and what the loops read of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trainer.data.annotation import annotation_id, pair_id, parse
from rlhf_trainer.data.rows import Preference, load_preferences
from rlhf_trainer.data.text import normal, words
from rlhf_trainer.desk.datasets import _annotate, _gold
from rlhf_trainer.desk.grammar import careful_reply, sloppy_reply
from rlhf_trainer.desk.prompts import draw_prompts
from rlhf_trainer.desk.raters import careful_panel
from rlhf_trainer.exits import Invalid
from tests.trainer.data_world import ROW, annotations_of, write_lines

TEXT = st.text("abAB é\n\u0301.?", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


def test_a_row_of_the_desk_is_valid_and_complete() -> None:
    rng = random.Random(0)
    rater = careful_panel("careful")[0]
    prompt = draw_prompts(rng, 1)[0]
    a, b = careful_reply(rng, prompt), sloppy_reply(rng, prompt)
    row = _annotate(rng, prompt, a, b, rater, "careful-1") | _gold(rng, prompt, a, b)
    (annotation,) = annotations_of([row])
    assert annotation.rater_id == rater.rater_id
    assert annotation.cohort == rater.cohort
    assert annotation.shown_first in ("a", "b")
    assert annotation.duration_s is not None
    assert annotation.duration_s > 1


def test_the_six_columns_of_the_first_data_sets_are_enough() -> None:
    (annotation,) = annotations_of([ROW | {"rater_id": "r1", "is_gold": False}])
    assert (annotation.rater_type, annotation.cohort, annotation.gold_preference) == ("human", "unknown", None)


def test_a_pair_is_the_same_whichever_response_is_called_a() -> None:
    swapped = ROW | {"response_a": ROW["response_b"], "response_b": ROW["response_a"], "preference": "b"}
    one, other = annotations_of([ROW, swapped])
    assert one.pair_id == other.pair_id
    assert one.choice == other.choice
    assert one.preference != other.preference


@given(prompt=TEXT, a=TEXT, b=TEXT)
def test_a_pair_id_ignores_order_and_layout_and_nothing_else(prompt: str, a: str, b: str) -> None:
    assert pair_id(prompt, a, b) == pair_id(f" {prompt}\n", b, f"{a}  ")
    assert pair_id(prompt + "x", a, b) != pair_id(prompt, a, b)
    if normal(a) != normal(b):
        assert pair_id(prompt, a, a) != pair_id(prompt, a, b)


def test_composed_and_decomposed_letters_are_one_text() -> None:
    assert pair_id("caf\u00e9", "x", "y") == pair_id("cafe\u0301", "x", "y")


def test_a_row_without_an_id_is_named_by_its_content_without_what_is_derived() -> None:
    assert annotation_id(ROW) == annotation_id(ROW | {"split": "train", "pair_id": "p"})
    assert annotation_id(ROW) != annotation_id(ROW | {"preference": "b"})
    assert annotation_id(ROW | {"annotation_id": "given"}) == "given"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"prompt": None}, "PREF001", "field 'prompt' is empty"),
        ({"response_a": "  "}, "PREF001", "field 'response_a' is empty"),
        ({"response_b": 7}, "PREF001", "field 'response_b' is int"),
        ({"prompt": []}, "PREF001", "field 'prompt' is a list that holds no messages"),
        ({"prompt": [{"content": "hi"}]}, "PREF003", "roles must alternate"),
        ({"preference": "A"}, "PREF002", "'A', not one of a, b, tie, both_bad"),
        ({"preference": None}, "PREF002", "None, not one of"),
        ({"preference": 1}, "PREF002", "1, not one of"),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "PREF003",
            "got ['user', 'assistant']",
        ),
        ({"prompt": [{"role": "user", "content": "x"}] * 2}, "PREF003", "got ['user', 'user']"),
        ({"response_b": [{"role": "user", "content": "x"}]}, "PREF003", "field 'response_b' has turns of user"),
        ({"response_b": "the  elbe\n"}, "PREF010", "are the same text"),
        ({"strength": 4}, "PREF004", "field 'strength' is 4; "),
        ({"strength": True}, "PREF004", "field 'strength' is True"),
        ({"strength": 10**400}, "PREF004", "field 'strength' is 1000"),
        ({"score_a": "5"}, "PREF004", "field 'score_a' is '5'"),
        ({"aspects": ["x"]}, "PREF004", "field 'aspects' is list"),
        ({"aspects": {"tone": "c"}}, "PREF004", "field 'aspects.tone' is 'c'"),
        ({"aspects": {"tone": {"a": 1}}}, "PREF004", "field 'aspects.tone'"),
        ({"aspects": {"tone": {"a": 1, "b": "2"}}}, "PREF004", "field 'aspects.tone.b'"),
        ({"rater_id": 4}, "PREF004", "field 'rater_id' is int"),
        ({"rater_type": "robot"}, "PREF004", "not one of human, model, rule, synthetic"),
        ({"cohort": ["x"]}, "PREF004", "field 'cohort' is list"),
        ({"created_at": "yesterday"}, "PREF004", "not an RFC 3339 time"),
        ({"created_at": "2026-03-01T10:00:00"}, "PREF004", "not an RFC 3339 time with its zone"),
        ({"created_at": 5}, "PREF004", "field 'created_at' is 5"),
        ({"duration_s": -1}, "PREF004", "field 'duration_s' is -1"),
        ({"confidence": 1.5}, "PREF004", "field 'confidence' is 1.5"),
        ({"shown_first": "left"}, "PREF004", "not one of a, b"),
        ({"is_gold": "yes"}, "PREF004", "'yes', not true or false"),
        ({"is_gold": True}, "PREF004", "gold_preference is missing"),
        ({"gold_preference": "both_bad", "is_gold": True}, "PREF004", "not one of a, b, tie"),
        ({"safety_a": True}, "PREF004", "field 'safety_a' is True"),
        ({"split": "test"}, "PREF004", "'test', not one of train, val, holdout, audit"),
    ],
)
def test_a_bad_row_is_named_by_code_and_field(change: dict[str, Any], code: str, says: str) -> None:
    annotation, findings = parse(ROW | change, 7)
    assert annotation is None
    found = next(each for each in findings if each.code == code)
    assert found.row == 7
    assert says.rstrip("; ") in found.message
    assert found.field in {*change, "gold_preference"}
    assert found.remedy


def test_every_error_of_a_row_is_told_at_once() -> None:
    _, findings = parse({"preference": "x", "strength": 9}, 1)
    assert [each.code for each in findings] == ["PREF001"] * 3 + ["PREF002", "PREF004"]


def test_the_loops_get_strength_aspects_cohort_and_rater(tmp_path: Path) -> None:
    row = ROW | {
        "strength": 2,
        "cohort": "brief",
        "rater_id": "r1",
        "aspects": {"tone": "b", "topic": {"a": 4, "b": 2}, "grammar": {"a": 3, "b": 3}},
    }
    path = write_lines(tmp_path / "p.jsonl", row, ROW | {"preference": "both_bad"}, ROW | {"probability_a": 0.8})
    first, soft = load_preferences(path)
    assert first == Preference(
        ROW["prompt"],
        ROW["response_a"],
        ROW["response_b"],
        1.0,
        strength=2.0,
        cohort="brief",
        aspects={"tone": 0.0, "topic": 1.0, "grammar": 0.5},
        rater="r1",
    )
    assert (soft.probability_a, soft.strength, soft.cohort, soft.rater) == (0.8, None, "unknown", "unknown")


def test_messages_are_read_as_text(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a river?"},
    ]
    path = write_lines(tmp_path / "p.jsonl", ROW | {"prompt": turns[:1]}, ROW | {"prompt": turns})
    assert [row.prompt for row in load_preferences(path)] == ["hi", "user: hi\nassistant: hello\nuser: a river?"]


def test_rows_that_only_feed_safety_are_no_preferences(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="every row is 'both_bad'"):
        load_preferences(write_lines(tmp_path / "p.jsonl", ROW | {"preference": "both_bad"}))


@pytest.mark.parametrize("change", [{"probability_a": 2}, {"strength": "high"}, {"aspects": 3}, {"rater_id": 5}])
def test_the_loops_refuse_what_the_contract_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match=f":1: field '{next(iter(change))}'"):
        load_preferences(write_lines(tmp_path / "p.jsonl", ROW | change))


def test_words_are_characters_where_nobody_writes_spaces() -> None:
    assert words("Größe, GRÖSSE!") == ["grösse", "grösse"]
    assert words("東京タワー high") == ["東", "京", "タ", "ワ", "ー", "high"]
