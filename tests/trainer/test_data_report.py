"""The label-quality report, the four commands and the difference of two versions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.__main__ import main
from rlhf_trainer.data.diff import difference, stability_index
from rlhf_trainer.data.report import Thresholds, as_dict, build_report
from rlhf_trainer.data.rows import load_preferences
from rlhf_trainer.digests import dataset_digest
from rlhf_trainer.wire import VerdictState
from tests.trainer.data_world import ROW, annotations_of, rows_by, write_lines

CAREFUL = {f"careful-{at}": 0.93 for at in range(6)}


def states(rows: list[dict[str, Any]], **thresholds: Any) -> dict[str, VerdictState]:
    report = build_report(annotations_of(rows), [], Thresholds(**thresholds))
    return {verdict.metric: verdict.state for verdict in report.verdicts}


def conspiring(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Raters who agree with each other on something that is not the truth."""
    rng = random.Random(seed)
    fancy = {row["prompt"]: rng.choice("ab") for row in rows}
    return [row | {"preference": fancy[row["prompt"]] if rng.random() < 0.95 else "tie"} for row in rows]


def test_careful_labels_are_trusted() -> None:
    found = states(rows_by(CAREFUL, pairs=400, labels=2, gold=0.2))
    assert set(found.values()) == {VerdictState.PASS}


def test_raters_who_agree_on_the_wrong_thing_are_refused_by_gold_alone() -> None:
    rows = conspiring(rows_by(CAREFUL, pairs=400, labels=2, gold=0.2), seed=1)
    found = states(rows)
    assert found == {
        "labelAgreement": VerdictState.PASS,
        "goldAccuracy": VerdictState.FAIL,
        "labelsTrusted": VerdictState.FAIL,
    }


@pytest.mark.parametrize(
    ("rows", "metric", "needed"),
    [
        (rows_by(CAREFUL, pairs=150, labels=2, gold=0.5), "labelAgreement", 50),
        (rows_by(CAREFUL, pairs=400, labels=1, gold=0.5), "labelAgreement", 200),
        (rows_by(CAREFUL, pairs=400, labels=2), "goldAccuracy", 30),
    ],
)
def test_too_little_evidence_is_no_pass_and_says_how_much_is_missing(
    rows: list[dict[str, Any]], metric: str, needed: int
) -> None:
    trusted = build_report(annotations_of(rows), []).trusted
    assert trusted.state is VerdictState.NEED_MORE_DATA
    assert trusted.message.startswith(metric)
    assert trusted.needed == needed


def test_a_coin_is_refused_and_a_doubtful_panel_undecided() -> None:
    coins = {f"c{at}": 0.5 for at in range(5)}
    assert states(rows_by(coins, pairs=400, labels=2, gold=0.3))["labelsTrusted"] is VerdictState.FAIL
    doubtful = {f"d{at}": 0.82 for at in range(5)}  # alpha 0.41 against a floor of 0.4
    found = states(rows_by(doubtful, pairs=300, labels=2, gold=0.3))
    assert found["labelAgreement"] is VerdictState.NEED_MORE_DATA


def test_the_report_tells_what_is_not_known() -> None:
    report = as_dict(build_report(annotations_of([ROW, ROW | {"prompt": "q", "preference": "tie"}]), []))
    assert (report["withoutRater"], report["withoutOrder"], report["tieShare"]) == (2, 2, 0.5)
    assert (report["krippendorffAlpha"], report["goldAccuracy"], report["raters"]) == (None, None, [])
    json.dumps(report, allow_nan=False)


def test_agreement_grows_with_strength_and_small_groups_are_not_shown() -> None:
    rng = random.Random(0)
    rows = []
    for row in rows_by(CAREFUL, pairs=400, labels=2):
        clear = int(row["prompt"].split()[1]) % 2
        coin = rng.choice("ab")
        rows.append(row | {"strength": 3 if clear else 1, "preference": row["preference"] if clear else coin})
    rows += [row | {"cohort": "few"} for row in rows_by(CAREFUL, pairs=5, labels=2, seed=9)]
    groups = as_dict(build_report(annotations_of(rows), []))["agreementBy"]
    assert groups["strength"]["3"]["share"] > 0.8 > 0.6 > groups["strength"]["1"]["share"]
    assert "cohort" not in groups


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "export.jsonl", *rows_by(CAREFUL, pairs=300, labels=2, gold=0.2))


def test_import_splits_pseudonymises_redacts_and_describes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write(json.dumps(ROW | {"rater_id": "mia@example.org", "response_b": "mail mia@example.org"}) + "\n")
    out = tmp_path / "v1.jsonl"
    assert main(["data", "import", str(data), "--out", str(out)]) == 11  # no key
    assert "RLHF_RATER_KEY" in capsys.readouterr().err
    monkeypatch.setenv("RLHF_RATER_KEY", "a secret")
    assert main(["data", "import", str(data), "--out", str(out)]) == 0
    assert "mia" not in out.read_text()
    assert "a secret" not in out.read_text() + capsys.readouterr().out
    manifest = json.loads((tmp_path / "v1.jsonl.manifest.json").read_text())
    assert manifest["datasetDigest"] == dataset_digest(out)
    assert manifest["splits"]["holdout"] > 60
    assert manifest["pii"]["replaced"] == {"EMAIL": 1}
    assert main(["data", "validate", str(out), "--pii", "reject", "--digest", manifest["datasetDigest"]]) == 0


def test_a_later_version_keeps_the_holdout(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, broken = (str(tmp_path / name) for name in ("v1.jsonl", "v2.jsonl", "v3.jsonl"))
    keep = ["--keep-rater-ids", "--out"]
    assert main(["data", "import", str(data), "--holdout-fraction", "0.5", *keep, first]) == 0
    # A smaller share would move prompts into training; the earlier sides are kept.
    again = ["data", "import", str(data), "--holdout-fraction", "0.1"]
    assert main([*again, "--previous", first, *keep, second]) == 0
    assert main(["data", "diff", first, second]) == 0
    assert main([*again, *keep, broken]) == 0
    capsys.readouterr()
    assert main(["data", "diff", first, broken, "--json"]) == 11
    assert json.loads(capsys.readouterr().out)["leftHoldout"] > 50
    assert main(["data", "validate", broken, "--previous", first]) == 11
    assert "PREF031 error: prompt moved from holdout to train" in capsys.readouterr().out


def test_report_gates_writes_json_and_soft_labels_that_the_loop_reads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pairs = tmp_path / "report.json", tmp_path / "pairs.jsonl"
    assert main(["data", "report", str(data), "--gate", "--out", str(out), "--pairs-out", str(pairs)]) == 0
    assert "Pass         labelsTrusted" in capsys.readouterr().out
    assert json.loads(out.read_text())["verdicts"][-1]["state"] == "Pass"
    soft = load_preferences(pairs)
    assert len(soft) == 300
    truths = {row["prompt"]: row["truth"] for row in map(json.loads, data.read_text().splitlines())}
    right = [(pair.probability_a > 0.5) == (truths[pair.prompt] == "a") for pair in soft]
    assert sum(right) / len(right) > 0.92
    assert main(["data", "report", str(data), "--gate", "--min-gold-accuracy", "0.99"]) == 10


def test_what_is_no_character_in_a_column_of_the_users_own_is_written_as_it_was_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ROW | {"comment": "\ud83d"})
    out = tmp_path / "out.jsonl"
    assert main(["data", "import", str(path), "--out", str(out), "--keep-rater-ids"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["comment"] == "\ud83d"
    assert dataset_digest(out) == json.loads(Path(f"{out}.manifest.json").read_text())["datasetDigest"]


def test_pii_off_needs_to_be_meant(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "import", str(data), "--keep-rater-ids", "--pii", "off", "--out", str(tmp_path / "x")]
    assert main(command) == 11
    assert "--acknowledge-risk" in capsys.readouterr().err
    assert main([*command, "--acknowledge-risk"]) == 0


def test_max_tokens_needs_a_tokenizer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "validate", str(data), "--max-tokens", "9"]) == 11
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["data", "validate", str(data), "--max-tokens", "9", "--tokenizer", str(tmp_path / "none")]) == 11
    assert "no tokenizer can be loaded" in capsys.readouterr().err


def test_a_difference_names_what_happened_to_each_annotation() -> None:
    old = rows_by(CAREFUL, pairs=20, labels=1)
    flip = {"a": "b", "b": "a"}
    new = [dict(row) for row in old[2:]]
    new[0]["preference"] = flip[new[0]["preference"]]
    new[1]["strength"] = 2
    # Renumbered and shown the other way round, but the same answer: nothing happened.
    turned = new[2]
    turned |= {
        "annotation_id": "renumbered",
        "response_a": turned["response_b"],
        "response_b": turned["response_a"],
        "preference": flip[turned["preference"]],
    }
    new.append(ROW | {"annotation_id": "fresh", "rater_id": "new"})
    found = difference(annotations_of(old), annotations_of(new))
    assert found.added == ["fresh"]
    assert found.removed == sorted(row["annotation_id"] for row in old[:2])
    assert found.relabelled == [new[0]["annotation_id"]]
    assert found.edited == [new[1]["annotation_id"]]
    assert (found.unchanged, found.flip_rate) == (16, 1 / 18)
    assert found.rater_shift > 0
    same = difference(annotations_of(old), annotations_of(list(reversed(old))))
    assert (same.added, same.removed, same.unchanged, same.rater_shift) == ([], [], 20, 0.0)


def test_the_stability_index_is_its_sum() -> None:
    assert stability_index({"x": 0.5, "y": 0.5}, {"x": 0.25, "y": 0.75}) == pytest.approx(
        0.25 * (0.6931472 + 0.4054651)
    )
    assert stability_index({"x": 1.0}, {"x": 1.0}) == 0.0
    assert stability_index({"x": 1.0}, {"y": 1.0}) > 10
