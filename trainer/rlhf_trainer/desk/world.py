"""Everything the desk writes, from one seed: models, feedback and the digests that name them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.desk import datasets
from rlhf_trainer.desk.policies import train_base, train_leaky
from rlhf_trainer.desk.raters import careful_panel, careless_panel
from rlhf_trainer.digests import dataset_digest, folder_digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is made; the defaults train a reward model in well under a minute on two cores."""

    pairs: int = 4000
    prompts: int = 1600
    scores: int = 400
    safety: int = 3000
    pretrain_steps: int = 300
    tune_steps: int = 150
    leaky_steps: int = 150


def generate(out: Path, seed: int = 0, sizes: Sizes | None = None, say: Say = lambda _text: None) -> dict[str, str]:
    """Write the world below ``out``; returns (and writes to digests.json) name → digest.

    The same seed gives the same digests on the same instruction set with one thread.
    """
    sizes = sizes or Sizes()
    say("training models/desk-sft")
    tokenizer, base = train_base(seed, pretrain_steps=sizes.pretrain_steps, tune_steps=sizes.tune_steps)
    say("training models/desk-leaky")
    leaky = train_leaky(tokenizer, base, seed, steps=sizes.leaky_steps)
    digests = {
        f"models/{name}": _save_model(out / "models" / name, tokenizer, model, name, seed)
        for name, model in (("desk-sft", base), ("desk-leaky", leaky))
    }
    say("asking the raters")
    for name, rows in _feedback(seed, sizes, (tokenizer, base), (tokenizer, leaky)).items():
        path = out / "feedback" / f"{name}.jsonl"
        datasets.write_rows(path, rows)
        digests[f"feedback/{name}.jsonl"] = dataset_digest(path)
    (out / "digests.json").write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def _feedback(seed: int, sizes: Sizes, base: tuple[Any, Any], leaky: tuple[Any, Any]) -> dict[str, list[datasets.Row]]:
    """Careful, careless and audit labels share neither raters nor samples: each has its own streams and ids."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    def draw(name: str) -> int:
        return rng(f"{name}/samples").getrandbits(31)

    panels = {
        "careful": careful_panel("careful"),
        "careless": careless_panel("careless"),
        "audit": careful_panel("audit"),
    }
    preferences = {
        name: datasets.preference_rows(rng(name), base, panel, pairs=sizes.pairs, name=name, sample_seed=draw(name))
        for name, panel in panels.items()
    }
    return preferences | {
        "prompts": datasets.prompt_rows(rng("prompts"), sizes.prompts),
        "prompts-drifted": datasets.drifted_prompt_rows(rng("drift"), sizes.prompts),
        "scores": datasets.score_rows(rng("scores"), base, count=sizes.scores, sample_seed=draw("scores")),
        "safety": datasets.safety_rows(rng("safety"), [base, leaky], count=sizes.safety, sample_seed=draw("safety")),
    }


def _save_model(folder: Path, tokenizer: Any, model: Any, name: str, seed: int) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    digest = folder_digest(folder)
    manifest = {"name": name, "digest": digest, "world": "service desk", "seed": seed}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digest
