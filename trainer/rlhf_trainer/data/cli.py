"""``python -m rlhf_trainer data validate|import|report|diff``: is this feedback fit to learn from. No torch.

Exit codes: 0 the data is fine (warnings included), 11 it is invalid, 10 `report --gate` does not trust the labels,
2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rlhf_trainer.data.access import write_bytes
from rlhf_trainer.data.diff import difference
from rlhf_trainer.data.documents import Document, read_document
from rlhf_trainer.data.findings import Finding, errors
from rlhf_trainer.data.importers import FORMATS, convert, detect
from rlhf_trainer.data.importing import Options, Prepared, prepare, to_jsonl
from rlhf_trainer.data.pair_view import pair_rows
from rlhf_trainer.data.render import diff_text, findings_text, report_text, summary
from rlhf_trainer.data.report import Thresholds, as_dict, build_report
from rlhf_trainer.data.text import utf8
from rlhf_trainer.data.validation import PiiPolicy, Policy, Validated, validate
from rlhf_trainer.digests import rows_digest
from rlhf_trainer.exits import Invalid
from rlhf_trainer.wire import ExitCode, VerdictState

RATER_KEY = "RLHF_RATER_KEY"  # of the environment: arguments are seen by every process


def add_parser(commands: Any) -> None:
    """The ``data`` command and its four verbs."""
    parser = commands.add_parser("data", help="validate, import, report on and compare preference data")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = _verb(verbs, "validate", "every rule over every row", _validate, "file")
    _add_checks(one)
    one.add_argument("--digest", help="sha256:… the rows must hash to")
    _import_arguments(_verb(verbs, "import", "an export into annotations", _import, "file"))
    report = _verb(verbs, "report", "agreement, raters and a verdict", _report, "file")
    report.add_argument("--min-agreement", type=_share, default=Thresholds().min_agreement)
    report.add_argument("--min-gold-accuracy", type=_share, default=Thresholds().min_gold_accuracy)
    report.add_argument("--gate", action="store_true", help="exit 10 unless the labels are trusted")
    report.add_argument("--out", help="also write the report as JSON here")
    report.add_argument("--pairs-out", help="write one row per pair with its aggregated probability_a (JSONL) here")
    _verb(verbs, "diff", "what changed between two versions", _diff, "old", "new")


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen verb; a refusal is one line and exit 11, never a traceback."""
    verb: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return verb(arguments)
    except Invalid as refusal:
        _print(refusal.message, sys.stderr)
        return int(ExitCode.INVALID)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.SUCCESS)


def _validate(arguments: argparse.Namespace) -> int:
    document = read_document(arguments.file)
    if arguments.max_tokens is not None and arguments.tokenizer is None:
        raise Invalid("--max-tokens counts tokens of a tokenizer; give its folder with --tokenizer")
    policy = Policy(
        max_tokens=arguments.max_tokens,
        count_tokens=None if arguments.tokenizer is None else _token_counter(arguments.tokenizer),
        pii=PiiPolicy(arguments.pii),
        digest=arguments.digest,
        previous=_sides(arguments.previous),
    )
    checked = _checked(document, policy)
    return _finish(
        arguments,
        document.source,
        checked.findings,
        {"rows": len(document.records), "datasetDigest": rows_digest([row for _, row in document.records])},
        [f"{len(document.records)} rows, {summary(checked.findings)}"],
    )


def _import(arguments: argparse.Namespace) -> int:
    key = os.environ.get(RATER_KEY)
    if not key and not arguments.keep_rater_ids:
        raise Invalid(
            f"rater ids are pseudonymised with a secret key: set {RATER_KEY} in the environment, "
            "or give --keep-rater-ids if they name nobody"
        )
    pii = PiiPolicy(arguments.pii)
    if pii is PiiPolicy.OFF and not arguments.acknowledge_risk:
        raise Invalid("--pii off keeps personal data in training data; give --acknowledge-risk as well, or redact")
    document = read_document(arguments.file)
    previous = read_document(arguments.previous) if arguments.previous else None
    options = Options(
        format=arguments.format,
        pii=pii,
        rater_key=None if arguments.keep_rater_ids or not key else key.encode(),
        holdout_fraction=arguments.holdout_fraction,
        previous=_sides_of(previous),
        parent=None if previous is None else rows_digest([row for _, row in previous.records]),
    )
    prepared: Prepared = prepare(document, options)
    told = [f"nothing was written: {summary(prepared.findings)}"]
    if not errors(prepared.findings):
        write_bytes(arguments.out, to_jsonl(prepared.rows))
        manifest = json.dumps(prepared.manifest, indent=2, sort_keys=True, ensure_ascii=False)
        write_bytes(f"{arguments.out}.manifest.json", utf8(f"{manifest}\n"))
        told = _import_text(arguments.out, prepared)
    return _finish(arguments, document.source, prepared.findings, {"manifest": prepared.manifest}, told)


def _import_text(out: str, prepared: Prepared) -> list[str]:
    manifest = prepared.manifest
    skipped = ", ".join(f"{n} {reason}" for reason, n in manifest["skipped"].items()) or "none"
    return [
        f"{manifest['format']}: {manifest['records']} records, {manifest['rows']} annotations, skipped: {skipped}",
        f"splits: {', '.join(f'{side} {n}' for side, n in manifest['splits'].items())}",
        f"personal data replaced: {sum(manifest['pii']['replaced'].values())}; not known from this format: "
        f"{manifest['unknown'] or 'nothing'}",
        f"wrote {out} ({manifest['datasetDigest']}), {summary(prepared.findings)}",
    ]


def _report(arguments: argparse.Namespace) -> int:
    document = read_document(arguments.file)
    checked = _checked(document, Policy())
    broken = [found for found in errors(checked.findings) if found.row is not None and found.code < "PREF011"]
    fatal = broken or [found for found in document.findings if found.code in ("PREF005", "PREF006")]
    if fatal or not checked.annotations:
        return _finish(arguments, document.source, checked.findings, {}, ["no report on invalid rows; mend them first"])
    report = build_report(
        checked.annotations,
        checked.findings,
        Thresholds(min_agreement=arguments.min_agreement, min_gold_accuracy=arguments.min_gold_accuracy),
    )
    found = as_dict(report)
    if arguments.out:
        write_bytes(arguments.out, utf8(json.dumps(found, indent=2, ensure_ascii=False) + "\n"))
    if arguments.pairs_out:
        write_bytes(arguments.pairs_out, to_jsonl(pair_rows(checked.annotations, report.aggregate)))
    # What the rules found is part of the report, and no reason to refuse it.
    _print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else "\n".join(report_text(report)))
    if not arguments.json:
        _print("\n".join(findings_text(document.source, checked.findings)))
    trusted = report.trusted.state is VerdictState.PASS
    return int(ExitCode.GATE_FAILED if arguments.gate and not trusted else ExitCode.SUCCESS)


def _diff(arguments: argparse.Namespace) -> int:
    sides = []
    for uri in (arguments.old, arguments.new):
        document = read_document(uri)
        checked = _checked(document, Policy(pii=PiiPolicy.OFF))
        fatal = [found for found in errors(checked.findings) if found.code < "PREF011" or found.code >= "PREF090"]
        if fatal:
            return _finish(arguments, document.source, fatal, {}, ["no comparison with invalid rows"])
        sides.append(checked.annotations)
    found = difference(sides[0], sides[1])
    _print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if arguments.json else "\n".join(diff_text(found)))
    return int(ExitCode.INVALID if found.left_holdout else ExitCode.SUCCESS)


def _checked(document: Document, policy: Policy) -> Validated:
    """Findings of the file, its format and its rows; other formats are validated as they would be imported."""
    if not document.records:
        return Validated([], document.findings)
    known = detect(document.records)
    if isinstance(known, Finding):
        return Validated([], [*document.findings, known])
    if known.name == "annotations":
        checked = validate(document.records, policy)
        return Validated(checked.annotations, [*document.findings, *checked.findings])
    imported = convert(document.records, known)
    checked = validate(list(enumerate(imported.rows, start=1)), policy)
    return Validated(checked.annotations, [*document.findings, *imported.findings, *checked.findings])


def _finish(
    arguments: argparse.Namespace, source: str, findings: Sequence[Finding], extra: dict[str, Any], told: list[str]
) -> int:
    bad = bool(errors(findings))
    if arguments.json:
        body = {"valid": not bad, **extra, "findings": [found.as_dict() for found in findings]}
        _print(json.dumps(body, indent=2, ensure_ascii=False))
    else:
        _print("\n".join([*findings_text(source, findings), *told]))
    return int(ExitCode.INVALID if bad else ExitCode.SUCCESS)


def _print(text: str, stream: TextIO | None = None) -> None:
    print(utf8(text).decode(), file=stream)


def _sides(uri: str | None) -> dict[str, str] | None:
    return _sides_of(read_document(uri)) if uri else None


def _sides_of(document: Document | None) -> dict[str, str] | None:
    """Prompt → split of an earlier version. Raises Invalid when it cannot be read: its holdout would be forgotten."""
    if document is None:
        return None
    checked = _checked(document, Policy(pii=PiiPolicy.OFF))
    fatal = [found for found in errors(checked.findings) if found.code < "PREF011" or found.code >= "PREF090"]
    if fatal:
        raise Invalid(fatal[0].line(document.source))
    sides = {each.prompt: each.split for each in checked.annotations if each.split is not None}
    if not sides:
        raise Invalid(f"{document.source}: no row has a split, so there is no holdout to keep; import it first")
    return sides


def _token_counter(folder: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Invalid(f"{folder}: no tokenizer can be loaded ({error}); give a model's folder") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _verb(
    verbs: Any, name: str, about: str, action: Callable[[argparse.Namespace], int], *files: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    for file in files:
        parser.add_argument(file, help="a path, file:// or s3://bucket/key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=action)
    return parser


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, help="tokens of prompt plus response")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that counts them")
    parser.add_argument("--pii", choices=[each.value for each in PiiPolicy], default=PiiPolicy.REDACT.value)
    parser.add_argument("--previous", help="an earlier version, whose holdout must stay")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="where the annotations go (JSONL); a manifest is put beside")
    parser.add_argument("--format", default="auto", help=f"auto, {', '.join(known.name for known in FORMATS)}")
    parser.add_argument("--pii", choices=[each.value for each in PiiPolicy], default=PiiPolicy.REDACT.value)
    parser.add_argument("--acknowledge-risk", action="store_true", help="needed by --pii off")
    parser.add_argument("--keep-rater-ids", action="store_true", help="the ids are no personal data")
    parser.add_argument("--holdout-fraction", type=_share, default=0.2)
    parser.add_argument("--previous", help="an earlier version, whose holdout is kept")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value
