"""The formatting recipe of scored text: a reward is only comparable where text becomes the same tokens.

It is stored with every reward model and verified wherever one scores. Another layout, another end of sequence or
another vocabulary would silently give other rewards, so each is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_trainer.data.encoding import Encoder

LAYOUT = "prompt+response+eos/v1"  # of ``Encoder.pair``


@dataclass(frozen=True)
class Recipe:
    """How text is laid out as tokens. ``bos`` is what the tokenizer itself puts in front of a prompt, if anything."""

    layout: str
    eos: str
    bos: str
    tokenizer: str  # digest of what it does to text

    @classmethod
    def of(cls, encoder: Encoder) -> Recipe:
        tokenizer = encoder.tokenizer
        lead = _lead(tokenizer)
        return cls(
            LAYOUT,
            str(tokenizer.convert_ids_to_tokens(encoder.eos_id)),
            " ".join(tokenizer.convert_ids_to_tokens(lead)),
            tokenizer_digest(tokenizer),
        )

    @classmethod
    def from_document(cls, document: Any) -> Recipe:
        """Raises ValueError where the document is not a recipe."""
        fields = ("layout", "eos", "bos", "tokenizer")
        if not isinstance(document, Mapping) or not all(isinstance(document.get(name), str) for name in fields):
            raise ValueError(f"formatting {document!r} is not a recipe of {', '.join(fields)}")
        return cls(*(document[name] for name in fields))

    def document(self) -> dict[str, str]:
        return asdict(self)

    def differences(self, other: Recipe) -> list[str]:
        """What differs, in words: empty when both lay text out alike."""
        mine, theirs = self.document(), other.document()
        return [f"{name} {mine[name]!r} is not {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over vocabulary, merges and normalisation; padding and truncation settings change no token and are left
    out. Files are not hashed: the same tokenizer is written differently by different versions of the library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = None
    if backend is not None:
        rules = json.loads(backend.to_str())
        for name in ("version", "padding", "truncation"):
            rules.pop(name, None)
    content = {"vocabulary": tokenizer.get_vocab(), "rules": rules}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _lead(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text."""
    whole = list(tokenizer("").input_ids)
    special = set(tokenizer.all_special_ids)
    return [token for token in whole if token in special and token != tokenizer.eos_token_id]
