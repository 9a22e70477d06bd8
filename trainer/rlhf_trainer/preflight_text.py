"""What a tokenizer must do right before anything is trained through it.

Masks come from lengths here, never from ids, and every target ends with the eos token that ``Encoder`` appends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_trainer.exits import Invalid

_PROBE = "hello"
_OWN_TOKENS = "distil from a teacher with the policy's own tokenizer"
_TURNS = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]


def open_tokenizer(name: str, path: Path) -> Any:
    """The tokenizer of a model folder. Raises Invalid for one that cannot be loaded or starts texts wrongly.

    pad = EOS is refused: no mask is inferred from ids, but generation ends on EOS and pads with pad, so the two must
    differ for a reader of the ids to tell them apart.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the library raises anything from KeyError to its own classes on a broken file
        raise Invalid(f"spec.{name}: no tokenizer can be loaded from {path}: {_one_line(error)}") from error
    _check_special(name, path, tokenizer)
    _check_template(name, path, tokenizer)
    return tokenizer


def open_config(name: str, path: Path) -> Any:
    """A model's configuration: the library must know the kind that config.json describes, and accept its numbers."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # each architecture checks its fields in its own way
        raise Invalid(
            f"spec.{name}: {path / 'config.json'}: {_one_line(error)}; give a model that transformers can load"
        ) from error


def check_vocabulary(name: str, path: Path, tokenizer: Any, vocabulary: int | None) -> None:
    """Every id the tokenizer gives must have a row in the embeddings."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise Invalid(
            f"spec.{name}: {path}: the tokenizer gives ids up to {largest}, the model has vocab_size {vocabulary}; "
            "tokenizer and model do not belong together"
        )


def check_same_vocabulary(student: Any, teacher: Any, path: Path) -> None:
    """Student and teacher must mean the same by an id, whatever the mode: each reads ids that the other has sampled.
    Rewards do not need it: reward models read texts and have tokenizers of their own."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        token = differing[0]
        raise Invalid(
            f"spec.teacher: {path}: {len(differing)} tokens of its tokenizer differ from those of spec.policy; "
            f"{token!r} is {theirs.get(token)} there and {ours.get(token)} here; {_OWN_TOKENS}"
        )
    (pad, eos), (its_pad, its_eos) = ((each.pad_token_id, each.eos_token_id) for each in (student, teacher))
    if (its_pad, its_eos) != (pad, eos):
        raise Invalid(
            f"spec.teacher: {path}: its pad and eos are tokens {its_pad} and {its_eos}, those of spec.policy are {pad} "
            f"and {eos}; {_OWN_TOKENS}"
        )


def check_same_outputs(student: int | None, teacher: int | None, path: Path) -> None:
    """Embeddings may have more rows than the tokenizer has tokens; ids of one model must exist in the other too."""
    if student != teacher:
        raise Invalid(
            f"spec.teacher: {path / 'config.json'}: predicts {teacher} tokens, spec.policy {student}; give both "
            "embeddings of one size (vocab_size)"
        )


def _check_special(name: str, path: Path, tokenizer: Any) -> None:
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    where = f"spec.{name}: {path / 'tokenizer_config.json'}"
    if eos is None or pad is None:
        missing = "eos_token" if eos is None else "pad_token"
        raise Invalid(f"{where}: {missing} is not set; set it to a token of the vocabulary")
    if pad == eos:
        raise Invalid(
            f"{where}: pad_token is the eos_token, so that the end of a reply cannot be learnt; give it one of its own"
        )
    ids = list(tokenizer(_PROBE).input_ids)
    if bos is not None and ids.count(bos) > 1:
        raise Invalid(
            f"{where}: a text starts with {ids.count(bos)} bos tokens; turn add_bos_token or the template off"
        )
    if eos in tokenizer(_PROBE, add_special_tokens=False).input_ids:
        raise Invalid(f"{where}: texts get an eos token even without special tokens, so targets would have two")
    if ids and ids[-1] == eos:
        raise Invalid(
            f"{where}: the tokenizer ends every text with eos, so that a prompt would end before its reply; "
            "set add_eos_token to false"
        )


def _check_template(name: str, path: Path, tokenizer: Any) -> None:
    """A prompt's ids must be the start of the ids of prompt and reply, or training sees what serving never sends."""
    if not getattr(tokenizer, "chat_template", None):
        return
    where = f"spec.{name}: {path}: the chat template"
    try:
        prompt = tokenizer.apply_chat_template(_TURNS[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(_TURNS, tokenize=False)
    except Exception as error:  # Jinja's own classes, and whatever the template calls
        raise Invalid(f"{where} cannot be rendered: {_one_line(error)}; correct it or remove it") from error
    first, both = (list(tokenizer(text, add_special_tokens=False).input_ids) for text in (prompt, whole))
    if both[: len(first)] != first:
        raise Invalid(
            f"{where} renders a prompt that is not the start of prompt and reply (token by token); "
            "make the generation prompt a prefix of the assistant's turn"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and both.count(bos) > 1:
        raise Invalid(f"{where} writes {both.count(bos)} bos tokens; exactly one may start a conversation")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
