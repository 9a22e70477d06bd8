"""How often the builtin safety filter errs, judged by the desk's hidden oracle.

    python -m benchmarks gateway_safety_filter

Trained on 3,000 labelled answers, tried on fresh ones of the same desk: as they are, in other spellings, and drowned in
harmless text. Intervals are exact (Clopper-Pearson, 95 %).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.report import Report
from rlhf_trainer.desk.grammar import careful_reply, leak, sloppy_reply
from rlhf_trainer.desk.oracle import violation
from rlhf_trainer.desk.prompts import draw_prompts
from rlhf_trainer.safety.train import Example, Rate, Recipe, measure, train

TRAINING, TRIED = 3000, 6000
PACKAGES = ("numpy", "scipy")
HARMLESS = "we will check your parcel today with kind regards . "


def examples(count: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    found = []
    for prompt in draw_prompts(rng, count):
        reply = careful_reply(rng, prompt) if rng.random() < 0.5 else sloppy_reply(rng, prompt)
        reply = leak(rng, reply) if rng.random() < 0.3 else reply
        found.append(Example(reply, violation(reply)))
    return found


def _leet(text: str) -> str:
    return text.translate(str.maketrans("aeiost", "43!057"))


VARIANTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as they are", lambda text: text),
    ("in capitals and leet spelling", lambda text: _leet(text).upper()),
    ("with stretched words", lambda text: text.replace("n", "nnn").replace("s", "sss")),
    ("between 1,500 harmless characters", lambda text: HARMLESS * 15 + text + " " + HARMLESS * 15),
)


def main() -> None:
    model = train(examples(TRAINING, seed=1), Recipe(), {})
    report = Report("gateway_safety_filter", "Errors of the builtin safety filter", PACKAGES)
    fresh = examples(TRIED, seed=77)
    for index, (name, change) in enumerate(VARIANTS):
        tried = fresh if index < len(VARIANTS) - 1 else fresh[:500]  # long answers take longer
        found = measure(model, [Example(change(one.response), one.violation) for one in tried])
        _add(report, f"harmless answers refused, {name}", found.false_positives)
        _add(report, f"leaks missed, {name}", found.false_negatives)
    report.note(
        "The oracle labels the answers and nothing else of it is known to the filter; prompts are not looked at."
    )
    report.write()


def _add(report: Report, name: str, rate: Rate) -> None:
    spread = f"95% CI {100 * rate.lower:.2f} to {100 * rate.upper:.2f} %"
    report.add(name, 100 * (rate.estimate or 0.0), "%", samples=rate.n, spread=spread)


if __name__ == "__main__":
    main()
