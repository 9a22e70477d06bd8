"""What the loops cost beyond the bare work: our step against generate, forward, backward and AdamW of the same rows.

Two processes of one thread each take turns. The loop's side has in it all that a run has: session, history, metrics,
checks, DeepSpeed's engine. The bare side calls the same kernels and nothing else (``trl_peers/bare.py``).
"""

from __future__ import annotations

import sys
from statistics import median

from scipy.stats import binom

from benchmarks.report import Report
from benchmarks.trl_peers.turns import PEERS, Case, Side, iqr, take_turns
from benchmarks.trl_peers.world import LENGTHS, SIZES, make

CASES = [
    Case(algorithm, size, lengths)
    for size in SIZES
    for algorithm in ("Reward", "DPO", "GRPO", "RLOO", "PPO")
    for lengths in LENGTHS
]
STEPS = {"60k": 200, "10M": 40}  # timed, of each side: an overhead is smaller than what steps differ by


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, whatever the distribution: between two order statistics."""
    ordered, out = sorted(values), int(binom.ppf(0.025, len(values), 0.5))
    return ordered[max(out - 1, 0)], ordered[min(len(values) - out, len(values) - 1)]


def main(names: list[str]) -> int:
    page = Report("loop_overhead", "Our loops against the bare work of their steps", ("torch", "deepspeed"))
    for case in CASES:
        if names and case.name not in names:
            continue
        world = make(PEERS / "worlds", case.size)
        sides = [Side(f"benchmarks.trl_peers.{side}", world, case) for side in ("ours", "bare")]
        ours, bare = take_turns(sides, STEPS[case.size])["seconds"]
        name = f"{case.algorithm}, {case.size}, {LENGTHS[case.lengths]}"
        page.add(f"{name}: loop", 1000 * median(ours), "ms/step", samples=len(ours), spread=iqr(ours))
        page.add(f"{name}: bare", 1000 * median(bare), "ms/step", samples=len(bare), spread=iqr(bare))
        overheads = [100 * (own / other - 1) for own, other in zip(ours, bare, strict=True)]
        low, high = median_interval(overheads)
        spread = f"95% CI {low:.1f} to {high:.1f} %"
        page.add(f"{name}: overhead", median(overheads), "%", samples=len(ours), spread=spread)
        print(f"{case.name}: {1000 * median(ours):.1f} / {1000 * median(bare):.1f} ms", flush=True)
    page.note(
        "One thread each, in turns; an overhead is the median over pairs of steps that ran one after the other. With "
        "spread lengths each side generates the lengths that its own policy samples, so their work differs a little."
    )
    page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
