"""The reports for people: plain text, one thing a line."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_trainer.data.agreement import noise_ceiling
from rlhf_trainer.data.diff import Difference
from rlhf_trainer.data.findings import Finding, errors
from rlhf_trainer.data.raters import RaterReport, gini
from rlhf_trainer.data.report import QualityReport
from rlhf_trainer.evals.stats import Interval
from rlhf_trainer.wire import VerdictState

_SHOWN = 20
_PREFERRED = {VerdictState.PASS: "Preferred", VerdictState.NEED_MORE_DATA: "Undecided"}


def findings_text(source: str, findings: Sequence[Finding], shown: int = _SHOWN) -> list[str]:
    """One line per finding, errors first; what exceeds the limit is counted."""
    ordered = errors(findings) + [each for each in findings if each not in errors(findings)]
    lines = [each.line(source) for each in ordered[:shown]]
    if len(ordered) > shown:
        lines.append(f"{source}: and {len(ordered) - shown} more; --json lists all")
    return lines


def summary(findings: Sequence[Finding]) -> str:
    bad = len(errors(findings))
    return f"{bad} error{'s' * (bad != 1)}, {len(findings) - bad} warning{'s' * (len(findings) - bad != 1)}"


def report_text(report: QualityReport) -> list[str]:
    return [
        f"{report.annotations} annotations of {report.pairs} pairs; ties {report.tie_share:.1%}; "
        f"without rater {report.without_rater}, without order {report.without_order}",
        *(f"{verdict.state.value:<12} {verdict.metric}: {verdict.message}" for verdict in report.verdicts),
        *(f"{_PREFERRED[verdict.state]:<12} {verdict.message}" for verdict in report.models),
        "",
        f"Krippendorff's alpha (ordinal)  {interval(report.alpha)}",
        f"mean pairwise Cohen's kappa     {interval(report.kappa)}",
        _raw(report),
        f"Dawid-Skene: {report.aggregate.rounds} rounds, against the majority on {report.flips} pairs",
        *_groups(report),
        "",
        *_raters(report.raters),
        *(
            [f"personal data: {', '.join(f'{n} {kind}' for kind, n in sorted(report.pii.items()))}"]
            if report.pii
            else []
        ),
    ]


def diff_text(found: Difference) -> list[str]:
    old, new = found.alpha
    flips = "" if found.flip_rate is None else f" ({found.flip_rate:.1%} of those in both)"
    lines = [
        f"added {len(found.added)}, removed {len(found.removed)}, relabelled {len(found.relabelled)}{flips}, "
        f"edited {len(found.edited)}, unchanged {found.unchanged}",
        f"population stability index: raters {found.rater_shift:.3f}, cohorts {found.cohort_shift:.3f}",
        f"Krippendorff's alpha: {old} before, {new} now",
    ]
    for name in ("added", "removed", "relabelled", "edited"):
        ids = getattr(found, name)
        if ids:
            lines.append(f"{name}: {', '.join(ids[:5])}{f', and {len(ids) - 5} more' if len(ids) > 5 else ''}")
    lines += [f"moved from {before} to {after}: {prompt[:80]}" for prompt, before, after in found.moved[:_SHOWN]]
    if found.left_holdout:
        lines.append(f"PREF031 error: {len(found.left_holdout)} prompts left the holdout; import with --previous")
    return lines


def interval(value: Interval | None) -> str:
    if value is None:
        return "unknown"
    return f"{value.estimate:.3f} [{value.lower:.3f}, {value.upper:.3f}] n={value.n}"


def _raw(report: QualityReport) -> str:
    if report.raw is None:
        return "no pair has two labels: agreement is unknown"
    n, share = report.raw
    return f"raw agreement {share:.1%} of {n} comparisons; noise ceiling of accuracy {noise_ceiling(share):.2f}"


def _groups(report: QualityReport) -> list[str]:
    return [
        f"agreement by {name}: " + ", ".join(f"{value} {share:.0%} (n={n})" for value, (n, share) in own.items())
        for name, own in report.groups.items()
    ]


def _raters(raters: Sequence[RaterReport]) -> list[str]:
    if not raters:
        return ["no row names its rater: nothing can be said about raters"]
    sizes = [rater.annotations for rater in raters]
    head = f"{'rater':<24} {'n':>6} {'gold':>20} {'skill':>6} {'P(first)':>9} {'tie':>6} {'sec':>6} {'self':>6}"
    lines = [f"{len(raters)} raters; the first has {raters[0].share:.1%}, Gini {gini(sizes):.2f}", head]
    for rater in raters[:_SHOWN]:
        gold = (
            "" if rater.gold is None else f"{rater.gold.estimate:.2f} [{rater.gold.lower:.2f}, {rater.gold.upper:.2f}]"
        )
        first = "" if rater.first is None else f"{rater.first.estimate:.2f}{'*' * rater.position_biased}"
        lines.append(
            f"{rater.rater[:24]:<24} {rater.annotations:>6} {gold:>20} {_figure(rater.skill):>6} {first:>9} "
            f"{rater.tie_rate:>6.1%} {_figure(rater.seconds, 1):>6} {_figure(rater.consistency):>6}"
        )
    if any(rater.position_biased for rater in raters):
        lines.append("* position bias")
    if len(raters) > _SHOWN:
        lines.append(f"and {len(raters) - _SHOWN} more; --json lists all")
    return lines


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
