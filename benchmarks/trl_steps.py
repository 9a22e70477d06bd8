"""Step time and memory of our loops against TRL's trainers: same models, same data, same generator lengths.

    python -m benchmarks trl_steps                      everything (on an idle machine; about 80 minutes)
    python -m benchmarks.trl_steps GRPO-60k-spread ...  single comparisons; the report keeps what it has of the others

Two processes of one thread each take turns, a step of ours, a step of theirs. TRL 1.16 is the peer; PPO left it in
1.13, so that comparison installs 1.12 beside the rest, for itself. Losses are first shown to be equal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.report import Report
from benchmarks.trl_peers.turns import PEERS, ROOT, Case, Side, iqr, take_turns
from benchmarks.trl_peers.world import LENGTHS, SIZES, make, tokens_per_step

OLD_TRL = "trl==1.12.0"
PAGE = 1 << 20


CASES = [
    Case(algorithm, size, lengths)
    for size in SIZES
    for algorithm in ("Reward", "DPO", "GRPO", "RLOO", "PPO", "PPO_nogc")
    for lengths in LENGTHS
]


def old_trl() -> Path:
    """The last TRL with PPO, alone in a folder: everything it needs is here already."""
    folder = PEERS / "trl-1.12"
    if not (folder / "trl").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / "pip")], check=True)
        pip = [str(PEERS / "pip" / "bin" / "pip"), "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, OLD_TRL], check=True)
    return folder


def compare(case: Case) -> dict[str, Any]:
    world = make(PEERS / "worlds", case.size)
    path = str(old_trl()) if case.algorithm.startswith("PPO") else ""
    sides = [Side("benchmarks.trl_peers.ours", world, case), Side("benchmarks.trl_peers.theirs", world, case, path)]
    return take_turns(sides, SIZES[case.size].timed)


def speeds(case: Case, kept: dict[str, Any]) -> tuple[float, float]:
    """Tokens/s of both sides. TRL's PPO does not say how long its replies are: those of the same policy here."""
    world, size = make(PEERS / "worlds", case.size), SIZES[case.size]
    ours, theirs = kept["replies"]
    per_step = [
        tokens_per_step(world, size, case.lengths, case.algorithm in ("Reward", "DPO"), reply)
        for reply in (ours, theirs or ours)
    ]
    own, other = (tokens / median(side) for tokens, side in zip(per_step, kept["seconds"], strict=True))
    return own, other


def check_losses() -> None:
    """Losses and gradients agree with TRL's on recorded batches, before any time is compared."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/trainer/test_trl_oracle.py"]
    subprocess.run(command, check=True, cwd=ROOT)


def report(found: dict[str, dict[str, Any]]) -> None:
    page = Report("trl_steps", "Step time against TRL, one CPU thread", ("torch", "transformers", "deepspeed", "trl"))
    for case in CASES:
        algorithm = case.algorithm.replace("_nogc", ", its gc taken out")
        name = f"{algorithm}, {case.size}, {LENGTHS[case.lengths]}"
        if case.name not in found:
            page.keep(name)
            continue
        kept = found[case.name]
        ours, theirs = kept["seconds"]
        peer = "TRL 1.12" if case.algorithm.startswith("PPO") else "TRL"
        page.add(f"{name}: ours", 1000 * median(ours), "ms/step", samples=len(ours), spread=iqr(ours))
        page.add(f"{name}: {peer}", 1000 * median(theirs), "ms/step", samples=len(theirs), spread=iqr(theirs))
        ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        spread = f"IQR {low:.2f} to {high:.2f}"
        page.add(f"{name}: ratio", median(ours) / median(theirs), "ours / TRL", samples=len(ratios), spread=spread)
        own, other = speeds(case, kept)
        said = f"ours {own:.0f}, {peer} {other:.0f} tokens/s"
        page.add(f"{name}: tokens/s", own / other, "ours / TRL", samples=len(ratios), spread=said)
        memory = f"ours {kept['peaks'][0] / PAGE:.0f} MiB, {peer} {kept['peaks'][1] / PAGE:.0f} MiB"
        page.add(f"{name}: peak memory", kept["peaks"][0] / kept["peaks"][1], "ours / TRL", samples=1, spread=memory)
    page.note(
        "Two processes in turns, a step each, one thread; the same weights, prompts or pairs, and reward model. Equal: "
        "no reply ends before the limit. Spread: exponential lengths, or what a policy fitted to them samples. Long "
        "prompts: 64 tokens before replies of 24, common to both replies of a pair and all samples of a group. Our "
        "steps have in them what TRL's have not: the check of the sampler's log-probs, and metrics of every step. PPO "
        "has a critic of its own on both sides. Tokens are those of prompts and replies, not of padding; with a "
        "spread, each side's replies are as long as its own policy made them."
    )
    page.note(
        "TRL 1.12's PPO collects garbage twice a step, which on models this small is most of its time; read its ratio "
        "only beside the row with those collections taken out, where there is one. Equal losses are checked first "
        "when all cases run, and always by tests/trainer/test_trl_oracle.py."
    )
    page.write()


def main(names: list[str]) -> int:
    PEERS.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    if not names:
        check_losses()
    try:
        for case in CASES:
            if not names or case.name in names:
                found[case.name] = compare(case)
                ours, theirs = (median(side) for side in found[case.name]["seconds"])
                print(f"{case.name}: {1000 * ours:.1f} / {1000 * theirs:.1f} ms = {ours / theirs:.2f}", flush=True)
    finally:
        report(found)  # cut short, a run keeps what it has
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
