"""TRL's preference formats: explicit prompt, implicit prompt, and either as messages.

None of them says who chose, when, or what was shown first.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_trainer.data.importers.base import (
    Converted,
    Format,
    common_turns,
    compact,
    has_list,
    has_text,
    identity,
    joined,
    messages,
    text,
)
from rlhf_trainer.data.rows import Row, RowProblem

# The last of these in a text is where the answer starts.
MARKERS = ("\n\nAssistant:", "<|im_start|>assistant\n", "<|assistant|>\n", "### Response:\n", "\nassistant:")
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")
_UNKNOWN = "rater, time and order: agreement and position bias cannot be judged"


def explicit(row: Row) -> Converted:
    pair = {"prompt": text(row, "prompt"), "response_a": text(row, "chosen"), "response_b": text(row, "rejected")}
    return _chosen("trl-explicit", row, pair)


def conversational(row: Row) -> Converted:
    if "prompt" in row:
        prompt = messages(row["prompt"], "prompt")
        a, b = (messages(row.get(side), side) for side in ("chosen", "rejected"))
        if any(turn["role"] != "assistant" for turn in (*a, *b)):
            raise RowProblem("fields 'chosen' and 'rejected' must hold assistant turns alone when there is a 'prompt'")
    else:
        prompt, a, b = common_turns(*(messages(row.get(side), side) for side in ("chosen", "rejected")))
    return _chosen("trl-conversational", row, {"prompt": prompt, "response_a": joined(a), "response_b": joined(b)})


def implicit(row: Row) -> Converted:
    """Cut at the last assistant marker: the longest common prefix would move shared first words into the prompt."""
    marker, prompt, a, b = cut_at_marker(text(row, "chosen"), text(row, "rejected"))
    return _chosen("trl-implicit", row, {"prompt": prompt + marker.rstrip(), "response_a": a, "response_b": b})


def cut_at_marker(chosen: str, rejected: str, markers: Sequence[str] = MARKERS) -> tuple[str, str, str, str]:
    """(marker, dialogue before it, chosen answer, rejected answer). Raises RowProblem when the dialogues differ."""
    marker = max(markers, key=lambda known: chosen.rfind(known))
    if marker not in chosen or marker not in rejected:
        raise RowProblem(
            "no assistant marker in 'chosen' and 'rejected', so where the answers start is not known; "
            "give a 'prompt' column"
        )
    prompt, a = chosen.rsplit(marker, 1)
    other, b = rejected.rsplit(marker, 1)
    if prompt.strip() != other.strip():
        raise RowProblem(
            "fields 'chosen' and 'rejected' differ before the assistant's last turn; both must answer the same dialogue"
        )
    a, b = _without_end(a), _without_end(b)
    for side, answer in (("chosen", a), ("rejected", b)):
        if not answer:
            raise RowProblem(f"field '{side}' ends without an answer; drop the row")
    return marker, prompt, a, b


def _without_end(answer: str) -> str:
    """The answer alone: its end is a token that the trainer's own recipe adds."""
    answer = answer.strip()
    for end in _ENDS:
        answer = answer.removesuffix(end).rstrip()
    return answer


def _chosen(name: str, row: Row, pair: Row) -> Converted:
    return Converted([compact({"annotation_id": identity(name, row), **pair, "preference": "a"})])


FORMATS = (
    Format(
        "trl-explicit",
        "prompt, chosen, rejected (texts)",
        lambda row: has_text(row, "prompt", "chosen", "rejected"),
        explicit,
        _UNKNOWN,
    ),
    Format(
        "trl-conversational",
        "[prompt,] chosen, rejected (lists of messages)",
        lambda row: has_list(row, "chosen", "rejected") and ("prompt" not in row or has_list(row, "prompt")),
        conversational,
        _UNKNOWN,
    ),
    Format(
        "trl-implicit",
        "chosen, rejected (texts that repeat the prompt)",
        lambda row: has_text(row, "chosen", "rejected") and "prompt" not in row,
        implicit,
        _UNKNOWN,
    ),
)
