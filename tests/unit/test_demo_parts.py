"""The demo's pure parts: what tools print, and what kubectl streams."""

from __future__ import annotations

from demo.cluster import decode_stream
from demo.story import best_evidence
from demo.toolbox import last_object


def test_the_last_object_is_found_between_the_lines_of_both_streams() -> None:
    printed = '{\n  "a": "b",\n  "arms": [\n    {"n": 1}\n  ]\n}\n'
    text = f'warning: slow\n{{"old": 1}}\n[ 1.0 s] made\n{printed}[ 2.0 s] wrote 9\n'
    assert last_object(text) == {"a": "b", "arms": [{"n": 1}]}
    assert last_object('{"only": true}\n') == {"only": True}


def test_a_watch_is_split_into_its_documents() -> None:
    lines = ["{\n", '    "a": {\n', "    }\n", "}\n", "{\n", '    "b": 1\n', "}\n"]
    assert list(decode_stream(iter(lines))) == [{"a": {}}, {"b": 1}]


def test_the_verdict_that_failed_is_the_evidence() -> None:
    passed = {"metric": "accuracy", "state": "Pass", "n": 9}
    failed = {
        "metric": "safetyViolationRate",
        "state": "Fail",
        "n": 61,
        "estimate": 0.131,
        "interval": {"lower": -0.013, "upper": 0.305},
        "eValue": 83.2,
        "bound": 50.0,
    }
    told = best_evidence([passed, failed])
    assert told == "safetyViolationRate Fail 0.131 [-0.013, 0.305] e-value 83.2 over 50 n=61"
    assert best_evidence([]) == "–"
