"""Importers against golden files, their traps, and the round trip of what was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_trainer.data.annotation import parse
from rlhf_trainer.data.documents import parse_document
from rlhf_trainer.data.findings import Finding
from rlhf_trainer.data.importers import FORMATS, convert, detect
from rlhf_trainer.data.importers.base import Format

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name.split(".")[0] for path in GOLDEN.glob("*.in.json*"))
WORDS = st.lists(
    st.text("abcdefg ?.", min_size=1, max_size=10).map(str.strip).filter(bool), min_size=3, max_size=3
).map(tuple)


def records_of(name: str) -> list[tuple[int, dict[str, Any]]]:
    (path,) = GOLDEN.glob(f"{name}.in.json*")
    return parse_document(str(path), path.read_bytes()).records


def imported(record: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    known = detect([(1, record)])
    assert isinstance(known, Format), known
    found = convert([(1, record)], known)
    assert found.findings == []
    return known.name, found.rows


def test_every_format_has_a_golden_file() -> None:
    assert set(NAMES) == {known.name for known in FORMATS} - {"label-studio-min"}  # which is refused


@pytest.mark.parametrize("name", NAMES)
def test_an_importer_gives_the_golden_rows_and_they_are_valid(name: str) -> None:
    known = detect(records_of(name))
    assert isinstance(known, Format)
    found = convert(records_of(name), known)
    golden = json.loads((GOLDEN / f"{name}.out.json").read_text())
    assert {"format": known.name, "skipped": dict(found.skipped), "rows": found.rows} == golden
    assert [each for number, row in enumerate(found.rows, start=1) for each in parse(row, number)[1]] == []
    assert len({row["annotation_id"] for row in found.rows}) == len(found.rows)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def explicit(prompt: str, a: str, b: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": a, "rejected": b}


def conversational(prompt: str, a: str, b: str) -> dict[str, Any]:
    start = message("user", prompt)
    return {"chosen": [start, message("assistant", a)], "rejected": [start, message("assistant", b)]}


def transcripts(prompt: str, a: str, b: str) -> dict[str, Any]:
    start = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": start + a, "rejected": start + b}


def helpsteer(prompt: str, a: str, b: str) -> dict[str, Any]:
    scale = {"overall_preference": -1, "individual_preference": []}
    return {"context": [message("user", prompt)], "response1": a, "response2": b, **scale}


def label_studio(prompt: str, a: str, b: str) -> dict[str, Any]:
    result = [{"type": "pairwise", "value": {"selected": "left"}}]
    return {"id": 1, "data": {"prompt": prompt, "answer1": a, "answer2": b}, "annotations": [{"result": result}]}


def argilla(prompt: str, a: str, b: str) -> dict[str, Any]:
    lists = {"q.responses": ["a"], "q.responses.users": ["u"], "q.responses.status": ["submitted"]}
    return {"prompt": prompt, "response_a": a, "response_b": b, **lists}


def ultrafeedback(prompt: str, a: str, b: str) -> dict[str, Any]:
    scored = [{"response": text, "overall_score": score} for text, score in ((b, 1), (a, 9))]
    return {"instruction": prompt, "completions": scored}


@pytest.mark.parametrize(
    "export", [explicit, conversational, transcripts, helpsteer, label_studio, argilla, ultrafeedback]
)
def test_what_was_exported_comes_back(export: Callable[[str, str, str], dict[str, Any]]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(texts=WORDS)
    def round_trip(texts: tuple[str, str, str]) -> None:
        prompt, a, b = texts
        _, (row,) = imported(export(prompt, a, b))
        spoken = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        assert (spoken, row["response_a"], row["response_b"], row["preference"]) == (prompt, a, b, "a")

    round_trip()


def test_shared_first_words_stay_in_the_answers() -> None:
    """The longest common prefix would move "I can" into the prompt."""
    _, (row,) = imported(transcripts("do you sing?", "I can sing.", "I can not."))
    assert (row["response_a"], row["response_b"]) == ("I can sing.", "I can not.")


def test_an_answer_may_hold_the_marks_of_other_formats() -> None:
    asked = "write a prompt for a model"
    name, (row,) = imported(transcripts(asked, "Like so:\n### Response:\nsay hi", "I can not."))
    assert (name, row["prompt"]) == ("hh", [message("user", asked)])
    assert (row["response_a"], row["response_b"]) == ("Like so:\n### Response:\nsay hi", "I can not.")


def test_equal_scores_are_a_tie_and_not_a_preference() -> None:
    record = conversational("p", "x", "y") | {"score_chosen": 3, "score_rejected": 3}
    name, (row,) = imported(record)
    assert (name, row["preference"]) == ("ultrafeedback-binarized", "tie")


@pytest.mark.parametrize("rating", ["N/A", "nan", "1e999", pytest.param(10**400, id="too large")])
def test_a_rating_that_is_no_number_is_none(rating: Any) -> None:
    record = ultrafeedback("p", "x", "y")
    for completion in record["completions"]:
        completion["annotations"] = {"helpfulness": {"Rating": rating}, "honesty": {"Rating": "4"}}
    _, (row,) = imported(record)
    assert row["aspects"] == {"honesty": {"a": 4.0, "b": 4.0}}


@pytest.mark.parametrize(("ranking", "preference"), [(["response_b", "response_a"], "b"), (["1", "2"], "a")])
def test_a_ranking_as_argilla_exports_it_names_the_best_first(ranking: list[str], preference: str) -> None:
    _, (row,) = imported(argilla("p", "x", "y") | {"q.responses": [ranking]})
    assert row["preference"] == preference


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"chosen": "x", "rejected": "y"}, "no assistant marker"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}, "same dialogue"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: y"}, "without an answer"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a"}, "no assistant marker"),
        (
            {"chosen": [message("user", "a"), message("assistant", "x")], "rejected": [message("assistant", "y")]},
            "same dialogue",
        ),
        ({"chosen": [{"role": "user"}], "rejected": []}, "without text in role and content"),
        ({"chosen": [], "rejected": []}, "not a list of messages"),
        ({"prompt": [], "chosen": [message("assistant", "x")], "rejected": []}, "'prompt' is not a list of messages"),
        (
            {"prompt": [message("user", "p")], "chosen": [message("user", "x")], "rejected": [message("user", "y")]},
            "assistant turns alone",
        ),
        (ultrafeedback("p", "x", "y") | {"completions": [3, 4]}, "'completions.0' is not an object"),
        (
            ultrafeedback("p", "x", "y") | {"completions": [{"response": "x", "overall_score": "9"}] * 2},
            "give a number",
        ),
        (helpsteer("p", "x", "y") | {"overall_preference": 4}, "from -3 to 3"),
        (helpsteer("p", "x", "y") | {"individual_preference": [None]}, "from -3 to 3"),
        (helpsteer("p", "x", "y") | {"individual_preference": 5}, "int, not a list"),
        (
            label_studio("p", "x", "y")
            | {
                "annotations": [
                    {"result": [{"type": "pairwise", "value": {"selected": side}}], "ground_truth": True}
                    for side in ("left", "right")
                ]
            },
            "two ground truth annotations disagree",
        ),
        (label_studio("p", "x", "y") | {"annotations": ["x"]}, "not an object"),
        (label_studio("p", "x", "y") | {"data": {"prompt": "p"}}, "'answer1' is missing"),
        ({"annotation_id": 1, "annotator": 2, "lead_time": 3, "prompt": "p"}, "export the project as JSON"),
        (argilla("p", "x", "y") | {"q.responses": ["maybe"]}, "'maybe' names neither"),
        (argilla("p", "x", "y") | {"q.responses": [["response_a", "response_a"]]}, "names neither"),
        (argilla("p", "x", "y") | {"q.responses.users": []}, "different lengths"),
        (argilla("p", "x", "y") | {"q.responses": "a"}, "not a list"),
        (argilla("p", "x", "y") | {"other.responses": []}, "name the one that compares"),
        ({"q.responses": ["a"], "text": "p"}, "no prompt field"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_row(record: dict[str, Any], says: str) -> None:
    known = detect([(3, record)])
    assert isinstance(known, Format), known
    found = convert([(3, record)], known)
    assert found.rows == []
    assert [(each.code, each.row) for each in found.findings] == [("PREF091", 3)]
    assert says in found.findings[0].message


def test_an_unknown_format_is_told_what_is_accepted_and_what_was_seen() -> None:
    found = detect([(1, {"question": "x", "best": "y"})])
    assert isinstance(found, Finding)
    assert found.code == "PREF090"
    assert "columns seen: best, question" in found.message
    for known in FORMATS:
        assert known.name in found.message


def test_one_bad_record_among_good_ones_is_a_bad_row_and_not_another_format() -> None:
    records = [(1, explicit("p", "x", "y")), (2, {"prompt": "p", "chosen": "x"}), (3, explicit("q", "x", "y"))]
    known = detect(records)
    assert isinstance(known, Format)
    assert [each.row for each in convert(records, known).findings] == [2]


def test_csv_is_no_json() -> None:
    document = parse_document("x.csv", b"prompt,chosen,rejected\na,b,c\n")
    assert {found.code for found in document.findings} == {"PREF005"}
