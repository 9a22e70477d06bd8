"""Load a model folder: verified first, warmed up last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.digests import check_digest, folder_digest
from rlhf_trainer.serve.batch import Batch, Row
from rlhf_trainer.serve.protocol import RequestError


class LoadError(ValueError):
    """The folder cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class Policy:
    """A loaded model with its tokenizer. `context`: longest prompt plus answer, tokens."""

    model: Any
    tokenizer: Any
    context: int
    end_ids: frozenset[int]
    pad_id: int

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens the tokenizer adds in front."""
        return tuple(self.tokenizer(text).input_ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation by the model's chat template. Raises RequestError without a template."""
        if not self.tokenizer.chat_template:
            raise RequestError("This policy has no chat template: use /v1/completions.", code="no_chat_template")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise RequestError(f"The policy's chat template refuses these messages: {error}.") from error
        # Most templates write the begin-of-sequence token themselves; adding it twice would be another prompt.
        begins = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return tuple(self.tokenizer(text, add_special_tokens=not begins).input_ids)


def load(folder: Path, digest: str | None) -> Policy:
    """Verify, load and warm up. Raises LoadError, or DigestMismatchError when the folder is not the pinned one."""
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    if digest is not None:
        check_digest(folder_digest(folder), digest, f"model folder {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{folder} is not a causal language model that transformers can load: {error}") from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked: any id will do
    context = int(getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length)
    policy = Policy(model, tokenizer, context, ends, pad)
    _warm_up(policy)
    return policy


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _warm_up(policy: Policy) -> None:
    """Two tokens: compiles and allocates what the first user would wait for, and shows that the model can be served."""
    batch = Batch(policy.model, policy.pad_id)
    batch.join([Row(policy.encode("hello") or (policy.pad_id,), 0.0, 0)])
    batch.step()
