"""Everything the desk writes, from one seed: models, feedback and the digests that name them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_trainer.desk import datasets
from rlhf_trainer.desk.policies import train_base, train_leaky
from rlhf_trainer.desk.raters import careful_panel, careless_panel
from rlhf_trainer.digests import dataset_digest, folder_digest
from rlhf_trainer.wire import digest_of

Say = Callable[[str], None]

_PACKAGE = Path(__file__).resolve().parent.parent
_DIGESTS, _ORIGIN = "digests.json", "origin"


@dataclass(frozen=True)
class Sizes:
    """How much is made; the defaults train a reward model in well under a minute on two cores."""

    pairs: int = 4000
    prompts: int = 1600
    attacks: int = 200
    scores: int = 400
    safety: int = 3000
    pretrain_steps: int = 300
    tune_steps: int = 150
    leaky_steps: int = 150


def generate(out: Path, seed: int = 0, sizes: Sizes | None = None, say: Say = lambda _text: None) -> dict[str, str]:
    """Write the world below ``out``; returns (and writes to digests.json) name → digest.

    The same seed gives the same digests on the same instruction set with one thread. What is whole there already and
    was made by this very code from the same seed and sizes is kept.
    """
    sizes = sizes or Sizes()
    origin = _origin(seed, sizes)
    if (kept := _kept(out, origin)) is not None:
        say("kept what was made before")
        return kept
    (out / _ORIGIN).unlink(missing_ok=True)
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
    (out / _DIGESTS).write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / _ORIGIN).write_text(origin + "\n", encoding="utf-8")
    return digests


def _origin(seed: int, sizes: Sizes) -> str:
    """Digest of all that the world is a function of: seed, sizes, this package's code and the libraries'."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    code = {str(path.relative_to(_PACKAGE)): path.read_text("utf-8") for path in sorted(_PACKAGE.rglob("*.py"))}
    return digest_of({"seed": seed, "sizes": asdict(sizes), "libraries": libraries, "code": code})


def _kept(out: Path, origin: str) -> dict[str, str] | None:
    """The digests of an earlier world of this origin whose files are all as they were written."""
    try:
        if (out / _ORIGIN).read_text("utf-8").strip() != origin:
            return None
        digests: dict[str, str] = json.loads((out / _DIGESTS).read_text("utf-8"))
        found = {name: (dataset_digest if name.endswith(".jsonl") else folder_digest)(out / name) for name in digests}
    except (OSError, ValueError):
        return None
    return digests if found == digests else None


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
        "attacks": datasets.attack_rows(rng("attacks"), sizes.attacks),
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
