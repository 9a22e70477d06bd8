"""The rules of a preference data set: every row by itself, then what only shows over all rows.

`validate` never raises and never stops at the first error: a person mends a file once, not once per error.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rlhf_trainer.data import pii
from rlhf_trainer.data.annotation import Annotation, parse
from rlhf_trainer.data.findings import Finding, finding
from rlhf_trainer.data.near_duplicates import near_duplicates
from rlhf_trainer.data.raters import contradictions, rater_reports
from rlhf_trainer.data.rows import UNKNOWN, Row
from rlhf_trainer.data.split import TRAIN
from rlhf_trainer.data.text import normal
from rlhf_trainer.digests import row_digest, rows_digest

_MIN_GOLD = 5  # gold answers before a rater is judged by them
_MIN_TIMED = 10  # timed answers before a pace is
_SHOWN_IDS = 3
_AGGREGATED = "…"


class PiiPolicy(StrEnum):
    """What personal data in the texts means: an error, a warning (it will be redacted), or nothing."""

    REJECT = "reject"
    REDACT = "redact"
    OFF = "off"


@dataclass(frozen=True)
class Policy:
    """Thresholds of the rules; the defaults are those of docs/preference-data.md."""

    max_tokens: int | None = None
    count_tokens: Callable[[str], int] | None = None
    max_too_long: float = 0.05
    max_contradicting: float = 0.01
    contradiction: float = 0.5  # of the scores' range
    near_duplicate: float = 0.8
    min_gold_accuracy: float = 0.6
    min_seconds: float = 2.0
    min_cohort: int = 20
    pii: PiiPolicy = PiiPolicy.REDACT
    digest: str | None = None
    previous: Mapping[str, str] | None = None  # prompt → split of an earlier version


@dataclass(frozen=True)
class Validated:
    annotations: list[Annotation]
    findings: list[Finding]


def validate(records: Sequence[tuple[int, Row]], policy: Policy | None = None) -> Validated:
    """Annotations of the valid rows, and all findings in order of row."""
    policy = policy or Policy()
    annotations: list[Annotation] = []
    findings: list[Finding] = []
    for number, row in records:
        annotation, found = parse(row, number)
        findings += found
        if annotation is not None:
            annotations.append(annotation)
    findings += duplicate_ids(records)
    for rule in (
        too_long, duplicates, leakage, moved, own_contradictions, aspect_contradictions, rater_rules,
        small_cohorts,
    ):  # fmt: skip
        findings += rule(annotations, policy)
    findings += personal_data(records, policy)
    findings += digest_mismatch(records, policy)
    return Validated(annotations, sorted(findings, key=lambda found: (found.row or 0, found.code)))


def duplicate_ids(records: Sequence[tuple[int, Row]]) -> list[Finding]:
    """PREF020: one id, different content. The same row twice is a duplicate (PREF021)."""
    seen: dict[str, set[bytes]] = defaultdict(set)
    first: dict[str, int] = {}
    for number, row in records:
        given = row.get("annotation_id")
        if isinstance(given, str) and given:
            seen[given].add(row_digest(row))
            first.setdefault(given, number)
    return [
        finding(
            "PREF020", f"annotation_id '{name}' appears with {len(contents)} contents", first[name], "annotation_id"
        )
        for name, contents in seen.items()
        if len(contents) > 1
    ]


def too_long(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    if policy.max_tokens is None or policy.count_tokens is None or not annotations:
        return []
    count, limit = policy.count_tokens, policy.max_tokens
    long = [
        each for each in annotations if count(each.prompt) + max(map(count, (each.response_a, each.response_b))) > limit
    ]
    if not long:
        return []
    share = len(long) / len(annotations)
    message = f"{len(long)} pairs exceed maxTokens={limit}; {share:.1%} would be dropped"
    return [finding("PREF011", message, long[0].row, error=share > policy.max_too_long)]


def duplicates(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    """PREF021: one rater's same answer to one pair under several ids, and pairs whose texts are nearly the same. Equal
    answers of raters without names are copies only where the id is the same: several people may have given them."""
    answers = Counter(
        (each.pair_id, each.rater_id if each.has_rater else each.annotation_id, each.choice, each.created_at)
        for each in annotations
    )
    exact = sum(count - 1 for count in answers.values())
    texts = {each.pair_id: _pair_text(each) for each in annotations}
    near = len(near_duplicates(list(texts.values()), policy.near_duplicate))
    if not exact and not near:
        return []
    message = f"{exact} exact and {near} near-duplicate pairs (Jaccard ≥ {policy.near_duplicate:g})"
    return [finding("PREF021", message)]


def leakage(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    """PREF030: a prompt outside train that train has too, or nearly so."""
    sides: dict[str, set[bool]] = defaultdict(set)
    for each in annotations:
        if each.split is not None and each.split != "quarantine":
            sides[normal(each.prompt)].add(each.split == TRAIN)
    exact = sum(len(found) > 1 for found in sides.values())
    prompts = list(sides)
    near = {
        next(prompts[at] for at in pair if sides[prompts[at]] == {False})
        for pair in near_duplicates(prompts, policy.near_duplicate)
        if {frozenset(sides[prompts[at]]) for at in pair} == {frozenset({True}), frozenset({False})}
    }
    if not exact and not near:
        return []
    message = f"{exact + len(near)} holdout prompts also in train (exact {exact}, near {len(near)})"
    return [finding("PREF030", message, field="split")]


def moved(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    """PREF031: what was once held out must never be trained on."""
    old = {normal(prompt): split for prompt, split in (policy.previous or {}).items()}
    gone = {
        each.prompt: each
        for each in annotations
        if each.split == TRAIN and old.get(normal(each.prompt), TRAIN) not in (TRAIN, "quarantine")
    }
    return [
        finding("PREF031", f"prompt moved from {old[normal(prompt)]} to train", each.row, "split")
        for prompt, each in gone.items()
    ]


def own_contradictions(annotations: Sequence[Annotation], _policy: Policy) -> list[Finding]:
    repeated, opposite = contradictions(annotations)
    if not opposite:
        return []
    return [finding("PREF040", f"same rater gave opposite labels on {opposite} of {repeated} repeated pairs")]


def aspect_contradictions(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    """PREF041: the overall score against the mean of its aspects, both as a share of their range in the file."""
    scored = [
        (each, overall, [scores[side] for scores in each.aspect_scores.values()])
        for each in annotations
        for side, overall in enumerate((each.score_a, each.score_b))
        if overall is not None and each.aspect_scores
    ]
    overall_range = _range([overall for _, overall, _ in scored])
    aspect_range = _range([score for _, _, scores in scored for score in scores])
    if overall_range is None or aspect_range is None:
        return []
    wrong = {
        each.row
        for each, overall, scores in scored
        if abs(_place(overall, overall_range) - _place(sum(scores) / len(scores), aspect_range)) > policy.contradiction
    }
    if not wrong:
        return []
    share = len(wrong) / len({each.row for each, _, _ in scored})
    message = (
        f"overall score contradicts mean of aspects by > {policy.contradiction:g} of the range in {len(wrong)} rows"
    )
    return [finding("PREF041", message, min(wrong), "aspects", error=share > policy.max_contradicting)]


def rater_rules(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    found = []
    for report in rater_reports(annotations, {}):
        who = f"rater {report.rater}"
        if report.position_biased and report.first is not None:
            evidence = f"P(first)={report.first.estimate:.2f} (n={report.shown}, q={report.first_q:.2g})"
            found.append(finding("PREF050", f"{who}: {evidence}, position bias", field="shown_first"))
        if report.seconds is not None and report.timed >= _MIN_TIMED and report.seconds < policy.min_seconds:
            message = f"{who}: median duration {report.seconds:.1f}s below {policy.min_seconds:g}s"
            found.append(finding("PREF051", message, field="duration_s"))
        gold = report.gold
        if gold is not None and gold.n >= _MIN_GOLD and gold.estimate < policy.min_gold_accuracy:
            # A few unlucky items are a warning; an error asks that chance be ruled out.
            sure = gold.upper < policy.min_gold_accuracy
            bound = f", at most {gold.upper:.2f}" if sure else f", perhaps {gold.upper:.2f}"
            message = (
                f"{who}: gold accuracy {gold.estimate:.2f} < {policy.min_gold_accuracy:g} on {gold.n} items{bound}"
            )
            found.append(finding("PREF052", message, field="rater_id", error=sure))
    return found


def personal_data(records: Sequence[tuple[int, Row]], policy: Policy) -> list[Finding]:
    """PREF060 counts by kind and names the first row; the value itself is never printed."""
    if policy.pii is PiiPolicy.OFF:
        return []
    rows: dict[str, list[int]] = defaultdict(list)
    for number, row in records:
        for kind in pii.kinds_in(row):
            rows[kind].append(number)
    reject = policy.pii is PiiPolicy.REJECT
    return [
        finding("PREF060", f"{len(where)} rows contain {kind}; policy={policy.pii}", where[0], error=reject)
        for kind, where in sorted(rows.items())
    ]


def small_cohorts(annotations: Sequence[Annotation], policy: Policy) -> list[Finding]:
    sizes = Counter(each.cohort for each in annotations)
    return [
        finding("PREF070", f"cohort '{cohort}' has {n} < {policy.min_cohort} annotations; its metrics are suppressed")
        for cohort, n in sorted(sizes.items())
        if cohort != UNKNOWN and n < policy.min_cohort
    ]


def digest_mismatch(records: Sequence[tuple[int, Row]], policy: Policy) -> list[Finding]:
    if policy.digest is None:
        return []
    actual = rows_digest([row for _, row in records])
    if actual == policy.digest:
        return []
    return [finding("PREF080", f"digest mismatch: spec {policy.digest}, data {actual}")]


def _pair_text(each: Annotation) -> str:
    first, second = sorted((each.response_a, each.response_b))
    return f"{each.prompt}\n{first}\n{second}"


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values and max(values) > min(values) else None


def _place(value: float, span: tuple[float, float]) -> float:
    return (value - span[0]) / (span[1] - span[0])
