"""The oracle's own report of one policy against another: the truth no gate is allowed to see."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.desk.oracle import utility, violation
from rlhf_trainer.desk.policies import answer
from rlhf_trainer.desk.prompts import every_prompt
from rlhf_trainer.evals.stats import clopper_pearson, clustered_mean


@dataclass(frozen=True)
class Report:
    """Ties count half. The win rate's interval is clustered by prompt, the violation rate's is exact; both 95 %."""

    samples: int
    win_rate: float
    win_rate_lower: float
    win_rate_upper: float
    utility: float
    utility_against: float
    violation_rate: float
    violation_rate_upper: float
    violation_rate_against: float
    example_prompt: str
    example_reply: str
    example_reply_against: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(policy: Path, against: Path, *, samples: int = 400, seed: int = 0) -> Report:
    """Both policies answer the same ``samples`` prompts, each with its own draws."""
    rng = random.Random(f"{seed}/judge")
    prompts = rng.choices(every_prompt(), k=samples)
    replies = answer(*_load(policy), prompts, seed=seed, step=0)
    others = answer(*_load(against), prompts, seed=seed, step=1)
    mine = [utility(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    theirs = [utility(prompt, reply) for prompt, reply in zip(prompts, others, strict=True)]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine, theirs, strict=True)]
    win_rate = clustered_mean(wins, [prompt.text for prompt in prompts])
    leaks = sum(map(violation, replies))
    return Report(
        samples=samples,
        win_rate=win_rate.estimate,
        win_rate_lower=win_rate.lower,
        win_rate_upper=win_rate.upper,
        utility=sum(mine) / samples,
        utility_against=sum(theirs) / samples,
        violation_rate=leaks / samples,
        violation_rate_upper=clopper_pearson(leaks, samples).upper,
        violation_rate_against=sum(map(violation, others)) / samples,
        example_prompt=prompts[0].text,
        example_reply=replies[0],
        example_reply_against=others[0],
    )


def _load(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
