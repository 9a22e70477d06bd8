"""Do the gates tell good labels from bad ones on every seed, before any traffic?

On the service desk world, seed by seed: a reward model on careful labels must pass its gate; one on careless labels and
one on 150 careful pairs must be refused, by a verdict with a name. Each then stands before the best-of-16 preflight
with an audit model of other raters, as it would if its gate had been waived. The hidden oracle is not asked.

Finished seeds are kept in ``.build/gate_seeds`` and not run again; delete the folder to start afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.harness.training import attempt
from benchmarks.report import RESULTS, Report
from rlhf_trainer.config import (
    BestOfNPreflight,
    Evaluation,
    HumanScores,
    PolicyTraining,
    RewardModelTraining,
    RewardModelValidation,
)
from rlhf_trainer.desk import datasets
from rlhf_trainer.desk.policies import train_base
from rlhf_trainer.desk.raters import careful_panel, careless_panel
from rlhf_trainer.distributed import World, join
from rlhf_trainer.loops.common import StopSignal
from rlhf_trainer.ranks import FOLDER_VARIABLE, RankFiles
from rlhf_trainer.wire import AttemptConfig, Located, Result, VerdictState, digest_of
from rlhf_trainer.worker import load_loop, run_attempt

CACHE = Path(__file__).resolve().parent.parent / ".build" / "gate_seeds"
LABELS = ("careful", "careless", "small", "audit")
REFUSED = ("careless", "small")
GATE, PREFLIGHT = "reward model", "best of 16"


@dataclass(frozen=True)
class Sizes:
    """``bases``: seeds share this many base models in turn; everything else of a seed is its own."""

    pairs: int = 4000  # careful ones
    other_pairs: int = 1500  # careless and audit
    small: int = 150
    scores: int = 800
    prompts: int = 1000
    bases: int = 5
    base_steps: tuple[int, int] = (300, 150)
    members: int = 1
    epochs: int = 6  # with 3 the models of one base were not trained out, and one of 20 stayed undecided


@dataclass(frozen=True)
class Judged:
    """One reward model before its gate: name, state, estimate and bounds of each verdict."""

    labels: str
    gate: str
    failure_class: str
    verdicts: tuple[dict[str, Any], ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.failure_class == "Success"

    @property
    def reasons(self) -> list[str]:
        return [f"{v['metric']} {v['state']}" for v in self.verdicts if v["state"] != VerdictState.PASS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--backwards", action="store_true", help="the last seed first: for a second process")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seeds = {}
    for seed in range(arguments.seeds)[:: -1 if arguments.backwards else 1]:
        seeds[seed] = play(CACHE, seed, Sizes())
        said = "; ".join(f"{one.labels}: {', '.join(one.reasons) or 'passes'}" for one in seeds[seed])
        print(f"seed {seed}: {said}", flush=True)
    write(dict(sorted(seeds.items())))
    return 0 if all(holds(models) for models in seeds.values()) else 1


def play(cache: Path, seed: int, sizes: Sizes, names: tuple[str, ...] = LABELS) -> list[Judged]:
    """All models of one seed before their gates, from the cache where they are there; without audit labels there is
    no preflight. Times are in CPU seconds of this process."""
    folder = cache / digest_of(asdict(sizes))[7:19] / f"seed-{seed:02d}"
    done = folder / "judged.json"
    if done.is_file():
        return [Judged(**{**row, "verdicts": tuple(row["verdicts"])}) for row in json.loads(done.read_text())]
    folder.mkdir(parents=True, exist_ok=True)
    base = base_model(folder.parent, seed % sizes.bases, sizes)
    write_feedback(folder, base, seed, sizes, names)
    judged = [train(folder, base, labels, seed, sizes) for labels in names]
    if "audit" in names:
        judged += [preflight(folder, base, labels, seed) for labels in ("careful", *REFUSED)]
    done.write_text(json.dumps([asdict(one) for one in judged], indent=1))
    return judged


def holds(models: list[Judged]) -> bool:
    """Careful labels pass the gate of the reward model, and careless and few ones are refused there. The audit's are
    the preflight's yardstick, 1,500 pairs whatever the base: of a weak one they need not pass."""
    return all(
        one.passed is (one.labels not in REFUSED) for one in models if one.gate == GATE and one.labels != "audit"
    )


def base_model(folder: Path, seed: int, sizes: Sizes) -> Path:
    base = folder / f"base-{seed}"  # appears whole, so that seeds may be played by several processes
    if not (base / "config.json").is_file():
        pretrain, tune = sizes.base_steps
        tokenizer, model = train_base(seed, pretrain_steps=pretrain, tune_steps=tune)
        aside = Path(tempfile.mkdtemp(dir=folder))
        tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
        if base.is_dir():  # another process was faster
            shutil.rmtree(aside)
        else:
            aside.rename(base)
    return base


def write_feedback(folder: Path, base: Path, seed: int, sizes: Sizes, names: tuple[str, ...]) -> None:
    """As ``desk.world``: careful, careless and audit labels share neither raters nor samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = (AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval())
    panels = {name: careful_panel(name) for name in ("careful", "audit")} | {"careless": careless_panel("careless")}
    for name, panel in panels.items():
        if name not in names:
            continue
        rng, draw = random.Random(f"{seed}/{name}"), random.Random(f"{seed}/{name}/samples").getrandbits(31)
        rows = datasets.preference_rows(rng, policy, panel, pairs=_pairs(name, sizes), name=name, sample_seed=draw)
        datasets.write_rows(folder / f"{name}.jsonl", rows)
        if name == "careful":
            datasets.write_rows(folder / "small.jsonl", rows[: sizes.small])
    rng, draw = random.Random(f"{seed}/scores"), random.Random(f"{seed}/scores/samples").getrandbits(31)
    scores = datasets.score_rows(rng, policy, count=sizes.scores, sample_seed=draw)
    datasets.write_rows(folder / "scores.jsonl", scores)
    datasets.write_rows(folder / "prompts.jsonl", datasets.prompt_rows(random.Random(f"{seed}/prompts"), sizes.prompts))


def _pairs(labels: str, sizes: Sizes) -> int:
    return sizes.pairs if labels == "careful" else sizes.other_pairs


def train(folder: Path, base: Path, labels: str, seed: int, sizes: Sizes) -> Judged:
    """One RewardModelJob's attempt, from preflight to verdicts, in this process."""
    scores = HumanScores(uri="pvc://feedback/scores.jsonl", digest="sha256:" + "0" * 64)
    config = AttemptConfig(
        kind="RewardModelJob",
        base_model=Located(path=str(base)),
        preferences=Located(path=str(folder / f"{labels}.jsonl")),
        human_scores=Located(path=str(folder / "scores.jsonl")),
        reward_model_training=RewardModelTraining(
            epochs=sizes.epochs,
            learning_rate=0.002,
            global_batch_size=64,
            ensemble={"members": sizes.members},
            deepspeed={"zero_stage": 0},
            seed=seed,
        ),
        validation=RewardModelValidation(human_scores=scores),
        **attempt(folder / "models" / labels, labels, 1),
    )
    began = time.process_time()
    result = run(config)
    verdicts = tuple(json.loads(verdict.to_json()) for verdict in result.verdicts)
    return Judged(labels, GATE, result.failure_class.value, verdicts, time.process_time() - began)


def preflight(folder: Path, base: Path, labels: str, seed: int) -> Judged:
    """The first minute of a PolicyOptimizationJob: refused before its first step, or let go (and ended after it)."""
    artifacts = {name: Located(path=str(folder / "models" / name / "a1" / "artifact")) for name in (labels, "audit")}
    config = AttemptConfig(
        kind="PolicyOptimizationJob",
        policy=Located(path=str(base)),
        reward_model=artifacts[labels],
        audit_reward_model=artifacts["audit"],
        prompts=Located(path=str(folder / "prompts.jsonl")),
        policy_training=PolicyTraining(steps=1, prompts_per_step=8, deepspeed={"zero_stage": 0}, seed=seed),
        evaluation=Evaluation(samples=16, best_of_n=BestOfNPreflight()),
        **attempt(folder / "policies" / labels, f"{labels}-policy", 1),
    )
    began = time.process_time()
    result = run(config)
    verdicts = [json.loads(v.to_json()) for v in result.verdicts if v.metric.startswith("bestOfN")]
    refused = any(verdict["state"] != VerdictState.PASS for verdict in verdicts)
    outcome = result.failure_class.value if refused or not verdicts else "Success"
    return Judged(labels, PREFLIGHT, outcome, tuple(verdicts), time.process_time() - began)


def run(config: AttemptConfig) -> Result:
    with alone() as world:
        return run_attempt(config, load_loop(config.kind), world, RankFiles.from_environment(), StopSignal())


@contextmanager
def alone() -> Iterator[World]:
    """The world of a single process, with one thread, and a folder for its heartbeat."""
    torch.set_num_threads(1)
    os.environ["RLHF_STATUS_PORT"] = "0"
    with tempfile.TemporaryDirectory() as ranks:
        os.environ[FOLDER_VARIABLE] = ranks
        yield join(timedelta(seconds=60))


def write(seeds: dict[int, list[Judged]]) -> None:
    report = Report("gate_seeds", "Gates on the service desk, seed by seed", ("torch", "transformers", "deepspeed"))
    every = [one for own in seeds.values() for one in own]
    for labels in LABELS:
        models = [one for one in every if (one.labels, one.gate) == (labels, GATE)]
        wanted = [one.passed is (labels not in REFUSED) for one in models]
        outcome = "refused by" if labels in REFUSED else "pass"
        report.add(f"{labels} labels {outcome} the {GATE} gate", _share(wanted), "fraction", samples=len(wanted))
    for labels in ("careful", *REFUSED):
        let = [one.passed for one in every if (one.labels, one.gate) == (labels, PREFLIGHT)]
        report.add(f"{labels} labels let go by {PREFLIGHT}", _share(let), "fraction", samples=len(let))
    cpu = [sum(one.seconds for one in own) for own in seeds.values()]
    report.add("training and gates of a seed, CPU time", sum(cpu) / len(cpu), "s", samples=len(cpu))
    report.note("small: the first 150 careful pairs. audit: careful labels of other raters on other replies.")
    report.note("Seeds share five base models in turn; labels, replies, scores and initial weights are their own.")
    report.note("Best of 16 is asked of every model, as if its first gate had been waived; all but Pass is refused.")
    report.write()
    table = RESULTS / "gate_seeds.md"
    table.write_text(table.read_text() + "\n## Seed by seed\n\n" + "\n".join(_rows(seeds)) + "\n")


def _share(held: list[bool]) -> float:
    return sum(held) / len(held)


def _rows(seeds: dict[int, list[Judged]]) -> list[str]:
    metrics = ("accuracy", "humanCorrelation", "bestOfNLift", "bestOfNLiftRatio")
    lines = [
        f"| seed | labels | {' | '.join(metrics)} | refused before traffic by |",
        "|---:|---|" + "---|" * (len(metrics) + 1),
    ]
    for seed, models in seeds.items():
        for labels in LABELS:
            own = [one for one in models if one.labels == labels]
            shown = {v["metric"]: v for one in own for v in one.verdicts}
            cells = [_cell(shown.get(metric)) for metric in metrics]
            reasons = ", ".join(reason for one in own for reason in one.reasons) or "nothing"
            lines.append(f"| {seed} | {labels} | {' | '.join(cells)} | {reasons} |")
    return lines


def _cell(verdict: dict[str, Any] | None) -> str:
    if verdict is None or "estimate" not in verdict:
        return "" if verdict is None else "too few"
    return f"{verdict['estimate']:.2f} [{verdict['lower']:.2f}, {verdict['upper']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
