"""The rules that only show over all rows, and files that are no data at all: a code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.__main__ import main
from rlhf_trainer.data.findings import RULES, Finding, Severity
from rlhf_trainer.data.validation import PiiPolicy, Policy, validate
from rlhf_trainer.digests import rows_digest
from tests.trainer.data_world import ROW, rows_by, write_lines


def found_in(rows: list[dict[str, Any]], code: str, policy: Policy | None = None) -> list[Finding]:
    found = validate(list(enumerate(rows, start=1)), policy).findings
    return [each for each in found if each.code == code]


def numbered(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [ROW | {"prompt": f"question {at}", "response_a": f"yes {at} {at}", **changes} for at in range(count)]


def scored(overall: float, at: int, aspect: float) -> dict[str, Any]:
    aspects = {"help": {"a": aspect, "b": 3.0}}
    return ROW | {"prompt": f"p{at}", "score_a": overall, "score_b": 5.0, "aspects": aspects}


LONG = "one two three four five six seven eight nine ten eleven twelve"
CLEAN = rows_by({"r1": 0.9, "r2": 0.9}, pairs=30, labels=2)
CASES: dict[str, tuple[list[dict[str, Any]], Policy, str]] = {
    "PREF011": (numbered(5), Policy(max_tokens=3, count_tokens=lambda text: len(text.split())), "5 pairs exceed"),
    "PREF020": (
        [ROW | {"annotation_id": "x"}, ROW | {"annotation_id": "x", "preference": "b"}],
        Policy(),
        "2 contents",
    ),
    "PREF021": ([ROW | {"rater_id": "r"}] * 3, Policy(), "2 exact and 0 near"),
    "PREF030": (
        [ROW | {"prompt": LONG, "split": "train"}, ROW | {"prompt": f"{LONG} more", "split": "holdout"}],
        Policy(),
        "1 holdout prompts also in train (exact 0, near 1)",
    ),
    "PREF031": ([ROW | {"split": "train"}], Policy(previous={"name  a river": "holdout"}), "from holdout to train"),
    "PREF040": ([ROW | {"rater_id": "r", "preference": each} for each in "ab"], Policy(), "on 1 of 1 repeated"),
    "PREF041": (
        [scored(10, 0, 1.0), scored(1, 1, 1.0), scored(10, 2, 5.0)],
        Policy(),
        "in 1 rows",
    ),
    "PREF050": (numbered(60, rater_id="r", shown_first="a"), Policy(), "P(first)=1.00 (n=60"),
    "PREF051": (numbered(12, rater_id="r", duration_s=0.5), Policy(), "median duration 0.5s below 2s"),
    "PREF052": (numbered(12, rater_id="r", is_gold=True, gold_preference="b"), Policy(), "0.00 < 0.6 on 12 items"),
    "PREF060": ([ROW | {"response_a": "write to me@example.org"}], Policy(), "1 rows contain EMAIL"),
    "PREF070": (numbered(3, cohort="brief"), Policy(), "cohort 'brief' has 3 < 20"),
    "PREF080": ([ROW], Policy(digest="sha256:" + "0" * 64), "digest mismatch: spec sha256:000"),
}


@pytest.mark.parametrize("code", CASES)
def test_each_rule_finds_its_fault_and_is_silent_on_clean_rows(code: str) -> None:
    rows, policy, says = CASES[code]
    (found,) = found_in(rows, code, policy)
    assert says in found.message
    assert found.remedy == RULES[code].remedy
    clean = Policy(
        max_tokens=100,
        count_tokens=len,
        digest=rows_digest(CLEAN),
        previous={"question 0": "train", "other": "holdout"},
    )
    assert found_in(CLEAN, code, clean) == []


def test_people_without_names_who_agree_are_no_copies_of_each_other() -> None:
    """HelpSteer's annotators: whoever dropped the agreeing ones would keep the disagreements alone."""
    panel = [ROW | {"annotation_id": f"helpsteer2-{part}"} for part in range(3)]
    assert found_in(panel, "PREF021", Policy()) == []
    (found,) = found_in([panel[0], *panel], "PREF021", Policy())
    assert "1 exact" in found.message


def test_a_pace_is_judged_by_timed_answers_alone() -> None:
    untimed = numbered(40, rater_id="r")
    hasty = {"duration_s": 0.5}
    assert found_in([untimed[0] | hasty, *untimed[1:]], "PREF051", Policy()) == []
    assert len(found_in([*(row | hasty for row in untimed[:10]), *untimed[10:]], "PREF051", Policy())) == 1


def test_exact_copies_of_a_holdout_prompt_leak_too() -> None:
    (found,) = found_in([ROW | {"split": "train"}, ROW | {"split": "audit"}], "PREF030")
    assert "(exact 1, near 0)" in found.message


def test_a_rate_turns_a_warning_into_an_error() -> None:
    policy = Policy(max_tokens=4, count_tokens=lambda text: len(text.split()))
    short = [ROW | {"prompt": f"q{at}", "response_a": "yes", "response_b": "no"} for at in range(99)]
    long = ROW | {"prompt": LONG}
    (warned,) = found_in([*short, long], "PREF011", policy)
    (refused,) = found_in([*short[:9], long], "PREF011", policy)
    assert (warned.severity, refused.severity) == (Severity.WARNING, Severity.ERROR)
    right = [scored(1 + 9 * (at % 2), at, 1 + 4 * (at % 2)) for at in range(200)]
    (warned,) = found_in([*right, scored(10, 999, 1.0)], "PREF041")
    (refused,) = found_in([*right[:20], scored(10, 999, 1.0)], "PREF041")
    assert (warned.severity, refused.severity) == (Severity.WARNING, Severity.ERROR)


def test_unlucky_gold_answers_are_a_warning_and_a_sure_failure_an_error() -> None:
    gold = numbered(12, rater_id="r", is_gold=True, gold_preference="a")
    unlucky = [row | {"preference": "b"} if at < 6 else row for at, row in enumerate(gold)]
    hopeless = [row | {"preference": "b"} for row in gold]
    assert [found.severity for found in found_in(unlucky, "PREF052")] == [Severity.WARNING]
    assert [found.severity for found in found_in(hopeless, "PREF052")] == [Severity.ERROR]


@pytest.mark.parametrize(
    ("policy", "severity"),
    [(PiiPolicy.REJECT, [Severity.ERROR]), (PiiPolicy.REDACT, [Severity.WARNING]), (PiiPolicy.OFF, [])],
)
def test_personal_data_is_what_the_policy_says_and_is_never_printed(
    policy: PiiPolicy, severity: list[Severity]
) -> None:
    told = "i am zoe@example.org"
    for column in ({"prompt": told}, {"note": told}, {"messages": [{"role": "user", "content": told}]}):
        found = found_in([ROW | column], "PREF060", Policy(pii=policy))
        assert [each.severity for each in found] == severity, column
        assert all("zoe" not in each.message for each in found)
    assert not found_in([ROW | {"rater_id": "zoe@example.org"}], "PREF060", Policy(pii=policy)), (
        "pseudonyms are for that"
    )


def deep(levels: int) -> str:
    return json.dumps(ROW)[:-1] + ', "x": ' + "[" * levels + "]" * levels + "}"


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "PREF006"),
    "blank": (b"\n \n", "PREF006"),
    "empty array": (b"[]", "PREF006"),
    "binary": (bytes(range(256)) * 4, "PREF005"),
    "utf-16": (json.dumps(ROW).encode("utf-16"), "PREF005"),
    "truncated": (json.dumps(ROW)[:-5].encode(), "PREF005"),
    "csv": (b"prompt,chosen,rejected\na,b,c\n", "PREF005"),
    "parquet": (b"PAR1\x15\x04\x15", "PREF005"),
    "numbers": (b"1\n2\n", "PREF005"),
    "array of numbers": (b"[1, 2]", "PREF005"),
    "lists": (b"[1]\n[2]\n", "PREF005"),
    "NaN": (json.dumps(ROW | {"strength": float("nan")}).encode(), "PREF005"),
    "too large a number": (json.dumps(ROW)[:-1].encode() + b', "strength": 1e999}', "PREF005"),
    "too many digits": (json.dumps(ROW)[:-1].encode() + b', "x": ' + b"9" * 5000 + b"}", "PREF005"),
    "too deep": (deep(100_000).encode(), "PREF005"),
    "unclosed array": (b'[{"prompt": "p"},', "PREF005"),
    "other columns": (b'{"question": "q", "answer": "a"}\n', "PREF090"),
    "no columns": (b"{}\n", "PREF090"),
    "json_min": (b'[{"id": 1, "annotation_id": 2, "annotator": 3, "lead_time": 4, "prompt": "p"}]', "PREF091"),
    "missing column": (json.dumps(ROW | {"prompt": ""}).encode(), "PREF001"),
    "wrong preference": (json.dumps(ROW | {"preference": {"a": 1}}).encode(), "PREF002"),
    "wrong roles": (json.dumps(ROW | {"prompt": [{"role": "assistant", "content": "x"}]}).encode(), "PREF003"),
    "wrong type": (json.dumps(ROW | {"cohort": {}}).encode(), "PREF004"),
    "same text": (json.dumps(ROW | {"response_b": ROW["response_a"]}).encode(), "PREF010"),
    "null everywhere": (json.dumps(dict.fromkeys(ROW)).encode(), "PREF001"),
    "lone surrogate": (json.dumps(ROW | {"prompt": "half a smile: \ud83d"}).encode(), "PREF001"),
    "lone surrogate in a name": (json.dumps(ROW | {"cohort": "\ud800"}).encode(), "PREF004"),
    "lone surrogate in a column": (json.dumps({"\ud800": 1}).encode(), "PREF090"),
    "zero bytes": (json.dumps(ROW | {"prompt": "\x00", "preference": "?"}).encode(), "PREF002"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["validate", "import", "report", "diff"])
def test_a_malformed_file_ends_with_exit_11_and_a_code(
    name: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, code = FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    good = write_lines(tmp_path / "good.jsonl", ROW)
    out = tmp_path / "out.jsonl"
    out.write_text("written before")
    arguments = {
        "validate": ["validate", str(path)],
        "import": ["import", str(path), "--out", str(out), "--keep-rater-ids"],
        "report": ["report", str(path)],
        "diff": ["diff", str(good), str(path)],
    }[verb]
    assert main(["data", *arguments]) == 11
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert f"{path}" in told
    assert f"{code} error" in told
    assert RULES[code].remedy in told
    assert "Traceback" not in told
    assert out.read_text() == "written before"


def test_a_file_of_many_faults_is_read_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "x.jsonl", *[ROW | {"preference": "?"}] * 30, "{broken", ROW)
    assert main(["data", "validate", str(path)]) == 11
    assert "and 11 more; --json lists all" in capsys.readouterr().out
    assert main(["data", "validate", str(path), "--json"]) == 11
    told = json.loads(capsys.readouterr().out)
    assert (told["valid"], told["rows"]) == (False, 31)
    assert [found["row"] for found in told["findings"] if found["code"] == "PREF005"] == [31]
    assert len([found for found in told["findings"] if found["code"] == "PREF002"]) == 30
