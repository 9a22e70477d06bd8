"""A trial as JSON for the status, and back.

What cannot be read is an empty trial, without the counters it had seen: everything that the gateways still hold is
then folded again from the start, so even a damaged status leads to the right counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_operator.analysis.difference import LOWER_STAKES, UPPER_STAKES, Bets
from rlhf_operator.analysis.fold import Seen
from rlhf_operator.analysis.harm import RATE_RATIOS
from rlhf_operator.analysis.trial import Comparison, Metric, Trial

_DIGITS = 6  # of log wealths: an error of 1e-6 in a log e-value decides nothing


def to_json(trial: Trial) -> dict[str, Any]:
    return {
        "pods": {
            uid: {"epoch": seen.epoch, "past": list(seen.past), "rows": {k: list(v) for k, v in seen.rows.items()}}
            for uid, seen in trial.pods.items()
        },
        "stages": {str(stage): list(pair) for stage, pair in trial.stages.items()},
        "exposures": {key: list(pair) for key, pair in trial.exposures.items()},
        "comparisons": {str(metric): _comparison_to_json(value) for metric, value in trial.comparisons.items()},
        "harmfulServed": trial.harmful_served,
        "reference": list(trial.reference),
    }


def from_json(data: Any) -> Trial:
    try:
        return _from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError):
        return Trial()


def _from_json(data: Mapping[str, Any]) -> Trial:
    return Trial(
        pods={
            str(uid): Seen(
                str(seen["epoch"]),
                {str(name): tuple(int(n) for n in row) for name, row in seen["rows"].items()},
                tuple(str(epoch) for epoch in seen["past"]),
            )
            for uid, seen in data["pods"].items()
        },
        stages={int(stage): _pair(pair) for stage, pair in data["stages"].items()},
        exposures={str(key): _pair(pair) for key, pair in data["exposures"].items()},
        comparisons={Metric(name): _comparison_from_json(value) for name, value in data["comparisons"].items()},
        harmful_served=int(data["harmfulServed"]),
        reference=tuple(int(count) for count in data["reference"]),
    )


def _comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "logE": _rounded(comparison.log_e),
        "upper": _bets_to_json(comparison.upper),
        "lower": _bets_to_json(comparison.lower),
        "expectedBad": round(comparison.expected_bad, _DIGITS),
    }


def _comparison_from_json(data: Mapping[str, Any]) -> Comparison:
    return Comparison(
        log_e=_floats(data["logE"], len(RATE_RATIOS)),
        upper=_bets_from_json(data["upper"], UPPER_STAKES),
        lower=_bets_from_json(data["lower"], LOWER_STAKES),
        expected_bad=float(data["expectedBad"]),
    )


def _bets_to_json(bets: Bets) -> dict[str, Any]:
    return {"units": bets.units, "bad": bets.bad, "offsets": _rounded(bets.offsets)}


def _bets_from_json(data: Mapping[str, Any], stakes: tuple[float, ...]) -> Bets:
    return Bets(stakes, int(data["units"]), int(data["bad"]), _floats(data["offsets"], len(stakes)))


def _floats(values: Any, length: int) -> tuple[float, ...]:
    floats = tuple(float(value) for value in values)
    if len(floats) != length:
        raise ValueError(f"{len(floats)} numbers where the tests of this version keep {length}")
    return floats


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, _DIGITS) for value in values]
