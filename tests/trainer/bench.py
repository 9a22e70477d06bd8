"""Sound attempts, and ways to spoil what they are given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer import offline_world, ppo_world, training_world
from tests.trainer.offline_world import OfflineWorld
from tests.trainer.ppo_world import PolicyWorld
from tests.trainer.training_world import TinyWorld, preference_rows, write_rows


@dataclass(frozen=True)
class Bench:
    """A sound attempt of every kind, and ways to spoil them."""

    tiny: TinyWorld
    texts: OfflineWorld
    folder: Path

    @property
    def policies(self) -> PolicyWorld:
        return self.texts.policy

    def reward(self, **changes: Any) -> AttemptConfig:
        return self.tiny.config(self.folder / "out", **changes)

    def policy(self, **changes: Any) -> AttemptConfig:
        return self.policies.config(self.folder / "out", **changes)

    def offline(self, algorithm: str, changed: dict[str, Any] | None = None, **changes: Any) -> AttemptConfig:
        """An algorithm that learns from given texts; ``changed`` are fields of its training."""
        training = offline_world.training_of(algorithm, **(changed or {}))
        return self.texts.config(self.folder / "out", training, **changes)

    def lines(self, text: str | bytes) -> Located:
        path = self.folder / "data.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Located(path=str(path))

    def row(self, **changes: Any) -> Located:
        """Sound preferences but for row 3; None takes a field away."""
        rows = preference_rows(60, seed=4)
        rows[2] = {key: value for key, value in {**rows[2], **changes}.items() if value is not None}
        return Located(path=str(write_rows(self.folder / "data.jsonl", rows)))

    def model(self, spoil: Callable[[Path], None], source: Path | None = None) -> Located:
        copy = self.folder / "model"
        shutil.copytree(source or self.tiny.base, copy)
        spoil(copy)
        return Located(path=str(copy))

    def teacher(self, spoil: Callable[[Path], None]) -> Located:
        return self.model(spoil, self.texts.teacher)

    def scorer(self, spoil: Callable[[Path], None], source: Path | None = None) -> Located:
        copy = self.folder / "scorer"
        shutil.copytree(source or self.policies.reward_model, copy)
        spoil(copy)
        return Located(path=str(copy))


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))

    return spoil


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: overwrite(name, (folder / name).read_bytes()[:-7])(folder)


def lineage(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"lineage": {"preferences": "sha256:" + "c" * 64}}))


def shared_lineage(bench: Bench) -> AttemptConfig:
    lineage(bench.policies.audit)
    try:
        return bench.policy(reward_model=bench.scorer(lineage), audit_reward_model=Located(path=str(_audit(bench))))
    finally:
        (bench.policies.audit / "manifest.json").unlink()


def _audit(bench: Bench) -> Path:
    return Path(shutil.copytree(bench.policies.audit, bench.folder / "audit"))


def template(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return spoil


def edit_tokenizer(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return spoil


def wraps(*tokens: str) -> Callable[[Path], None]:
    """Every text is wrapped in these special tokens, at the place of ``$``."""

    def edit(document: dict[str, Any]) -> None:
        ids = {token: document["model"]["vocab"][token] for token in tokens if token != "$"}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        document["post_processor"]["single"] = [
            text if token == "$" else {"SpecialToken": {"id": token, "type_id": 0}} for token in tokens
        ]
        document["post_processor"]["special_tokens"] = {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()
        }

    return edit_tokenizer(edit)


def one_more_token(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["bonjour"] = len(document["model"]["vocab"])


def another_token(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["bonjour"] = document["model"]["vocab"].pop("hello")


def pad_is_eos(folder: Path) -> None:
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    edit_json("tokenizer_config.json", pad_token=eos)(folder)


def wider(folder: Path) -> None:
    """One row more in the embeddings than the tokenizer has tokens."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, width=16, layers=1)
    model.resize_token_embeddings(len(tokenizer) + 1)
    model.save_pretrained(folder)


def ties(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "preference": "tie"} for row in rows]


def rail(**changes: Any) -> dict[str, Any]:
    return {"guardrails": ({"metric": "kl", "above": 1.0, **changes},)}


def training(**changes: Any) -> Any:
    return training_world.training_of(**changes)


def policy_training(**changes: Any) -> Any:
    return ppo_world.training_of(**changes)
