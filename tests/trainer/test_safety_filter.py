"""The builtin safety filter: spellings, dilution, format, and errors measured on answers it has not seen."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_gateway.safety import FilterError, load
from rlhf_gateway.wire import SafetyFilter
from rlhf_trainer.desk.grammar import careful_reply, leak, sloppy_reply
from rlhf_trainer.desk.oracle import violation
from rlhf_trainer.desk.prompts import draw_prompts
from rlhf_trainer.digests import file_digest
from rlhf_trainer.safety.__main__ import main, read_examples
from rlhf_trainer.safety.scorer import FormatError, LinearFilter, buckets_of, normalise, windows
from rlhf_trainer.safety.train import DataError, Example, Recipe, measure, rate, split, train


def desk_examples(count: int, seed: int) -> list[Example]:
    """Answers as a desk's reviewers see them: careful, sloppy, and some that tell a secret."""
    rng = random.Random(seed)
    found = []
    for prompt in draw_prompts(rng, count):
        reply = careful_reply(rng, prompt) if rng.random() < 0.5 else sloppy_reply(rng, prompt)
        reply = leak(rng, reply) if rng.random() < 0.3 else reply
        found.append(Example(reply, violation(reply)))
    return found


@pytest.fixture(scope="module")
def trained() -> LinearFilter:
    return train(desk_examples(1500, seed=1), Recipe(buckets=1 << 14), {"data": "sha256:x"})


@pytest.mark.parametrize(
    "text",
    [
        "Your PASSWORD is four", "your p4ssw0rd is four", "your pa\u200bssword is four", "your pássword is four",
        "your ｐａｓｓｗｏｒｄ is four", "your p.a.s.s.w.o.r.d is four", "your p a s s w o r d is four",
        "your passssword is four", "your pаsswоrd is four", "your   password\n is, four!", "your_password is four",
    ],
)  # fmt: skip
def test_one_spelling_for_many(text: str) -> None:
    assert normalise(text) == normalise("your password is four") == "your pasword is four"


def test_numbers_keep_their_length_only() -> None:
    assert normalise("pin 4821, dial 12") == "pin #### dial ##"
    assert normalise("pin 0000") == normalise("pin 4821")


@given(text=st.text(max_size=60))
def test_normalising_is_total_and_casefolded(text: str) -> None:
    assert normalise(text) == normalise(text.upper()) or text.upper().lower() != text.lower()
    assert "  " not in normalise(text)


@given(text=st.text("ab ", max_size=400), length=st.integers(2, 50))
def test_windows_cover_the_text(text: str, length: int) -> None:
    stride = max(1, length // 2)
    pieces = windows(text, length, stride)
    assert all(len(piece) <= max(length, len(text)) for piece in pieces)
    rebuilt = pieces[0] + "".join(piece[length - stride :] for piece in pieces[1:])
    assert rebuilt == text


def test_buckets_are_stable_over_processes_and_versions() -> None:
    grams = [b" a", b"ab", b"b ", b" ab", b"ab "]
    assert buckets_of("ab", (2, 3), 1000).tolist() == sorted({zlib.crc32(gram) % 1000 for gram in grams})
    assert zlib.crc32(b"ab ") % 1000 == 232


def test_held_out_errors_are_small_and_their_intervals_say_how_sure(trained: LinearFilter) -> None:
    test = trained.measured["test"]
    assert test["false_negatives"]["n"] > 50
    assert test["false_positives"]["upper"] < 0.05
    assert test["false_negatives"]["upper"] < 0.10
    assert test["false_positives"]["lower"] <= test["false_positives"]["estimate"] <= test["false_positives"]["upper"]


def test_errors_on_a_fresh_draw_agree_with_the_oracle(trained: LinearFilter) -> None:
    fresh = measure(trained, desk_examples(1000, seed=99))
    assert fresh.false_positives.upper < 0.03
    assert fresh.false_negatives.upper < 0.05


def test_shuffled_labels_teach_nothing() -> None:
    examples = desk_examples(600, seed=2)
    labels = [example.violation for example in examples]
    random.Random(0).shuffle(labels)
    wrong = [Example(example.response, label) for example, label in zip(examples, labels, strict=True)]
    model = train(wrong, Recipe(buckets=1 << 12), {})
    assert model.measured["test"]["false_negatives"]["estimate"] > 0.8


def test_harm_cannot_be_diluted_or_respelled(trained: LinearFilter) -> None:
    harmless = "we will check your parcel today . "
    assert not trained.violates(harmless * 30)
    assert trained.violates(harmless * 15 + "and your pin is four two . " + harmless * 15)
    assert trained.violates("glad we will fix your router and your P1N is four two .")


def test_training_is_deterministic() -> None:
    examples = desk_examples(400, seed=3)
    one = train(examples, Recipe(buckets=1 << 10), {})
    again = train(examples, Recipe(buckets=1 << 10), {})
    assert one.to_json() == again.to_json()


def test_equal_answers_never_straddle_the_split() -> None:
    parts = split([*desk_examples(300, seed=4), *desk_examples(300, seed=4)], seed=0)
    seen = [{normalise(example.response) for example in part} for part in parts.values()]
    for one, other in itertools.combinations(seen, 2):
        assert not one & other


def test_data_without_harm_is_refused() -> None:
    with pytest.raises(DataError, match="no harmful answer: label more"):
        train([Example(f"fine {n}", False) for n in range(100)], Recipe(), {})


def test_an_exact_interval() -> None:
    clean = rate(0, 2995)
    assert clean.estimate == 0.0
    assert clean.upper == pytest.approx(0.00123, abs=1e-5)
    assert rate(0, 0).estimate is None
    assert (rate(0, 0).lower, rate(0, 0).upper) == (0.0, 1.0)


def test_a_file_scores_as_the_filter_it_was_written_from(trained: LinearFilter, tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text(trained.to_json())
    read = LinearFilter.read(path)
    for example in desk_examples(50, seed=5):
        assert read.score(example.response) == trained.score(example.response)
    assert load(SafetyFilter(path=str(path), digest=file_digest(path))).violates("your pin is four two")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"weights": "!"},
        {"weights": "AAAA"},
        {"ngrams": [5, 2]},
        {"threshold": None},
    ],
)
def test_a_file_that_is_no_filter_says_so(trained: LinearFilter, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "filter.json"
    path.write_text(json.dumps(json.loads(trained.to_json()) | change))
    with pytest.raises(FormatError, match=r"filter\.json is not a safety filter of version 1"):
        LinearFilter.read(path)
    with pytest.raises(FilterError, match="make one with"):
        load(SafetyFilter(path=str(path), digest=file_digest(path)))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text(LinearFilter(np.array([np.nan], dtype=np.float32), 0.0, 0.0).to_json())
    with pytest.raises(FormatError, match="not finite"):
        LinearFilter.read(path)


def write(path: Path, examples: list[Example]) -> Path:
    rows = [{"prompt": "p", "response": e.response, "violation": e.violation} for e in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_line_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "labels.jsonl", desk_examples(600, seed=6))
    out = tmp_path / "deep" / "filter.json"
    assert main(["train", "--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1, "one line: a pod's log may put stderr between two"
    report = json.loads(printed)
    assert report["digest"] == file_digest(out)
    assert main(["eval", "--filter", str(out), "--data", str(data)]) == 0
    assert json.loads(capsys.readouterr().out)["seen_in_training"] is True
    other = write(tmp_path / "other.jsonl", desk_examples(200, seed=7))
    assert main(["eval", "--filter", str(out), "--data", str(other)]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["seen_in_training"] is False
    assert evaluated["measured"]["false_negatives"]["n"] > 20


def test_labels_are_read_as_any_tool_writes_them(tmp_path: Path) -> None:
    """A byte order mark, the line ends of Windows, and what JSON need not escape and Python takes for a line's end."""
    data = tmp_path / "labels.jsonl"
    data.write_bytes(
        b"\xef\xbb\xbf" + '{"response": "one\u2028two\x85", "violation": false}\r\n'.encode() + b"\r\n"
        b'{"response": "x", "violation": true}\r\n'
    )
    assert read_examples(data) == [Example("one\u2028two\x85", False), Example("x", True)]


def test_bytes_that_are_no_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "labels.jsonl"
    data.write_bytes(b'{"response": "x", "violation": true}\n{"response": "\xff", "violation": true}\n')
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "f.json")]) == 11
    assert "labels.jsonl:2: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"response": "x"}', "{", '{"response": 1, "violation": true}', "[]"])
def test_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    data = tmp_path / "labels.jsonl"
    data.write_text('{"response": "x", "violation": true}\n' + line + "\n")
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "f.json")]) == 11
    assert "labels.jsonl:2: " in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()
