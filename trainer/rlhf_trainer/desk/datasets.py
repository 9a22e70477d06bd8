"""Rows of feedback: preferences, prompts, human scores and safety labels, all a function of the seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_trainer.desk.grammar import careful_reply, leak, sloppy_reply
from rlhf_trainer.desk.oracle import utility, violation
from rlhf_trainer.desk.policies import answer
from rlhf_trainer.desk.prompts import Prompt, draw_prompts, every_prompt, parse
from rlhf_trainer.desk.raters import Rater, careful_panel
from rlhf_trainer.desk.vocabulary import SECRETS

Row = dict[str, Any]

GOLD_SHARE = 0.05
_GOLD_GAP = 1.5  # utility difference that nobody attentive can miss
SECOND_SHARE = 0.1  # of the pairs are labelled once more, or nobody could say how far raters agree
_SAME_RATER = 0.1  # of those by the same person, to see whether they answer as before


def preference_rows(
    rng: random.Random, policy: tuple[Any, Any], raters: Sequence[Rater], *, pairs: int, name: str, sample_seed: int
) -> list[Row]:
    """Annotations (one rater, one pair) of ``pairs`` pairs of different replies sampled from the policy, then second
    annotations of a tenth of them."""
    tokenizer, model = policy
    rows: list[Row] = []
    asked: list[tuple[Prompt, Rater]] = []
    step = 0
    while len(rows) < pairs:
        prompts = draw_prompts(rng, pairs - len(rows))
        first, second = (answer(tokenizer, model, prompts, seed=sample_seed, step=step + i) for i in (0, 1))
        step += 2
        for prompt, a, b in zip(prompts, first, second, strict=True):
            if a and b and a != b:
                rater = rng.choice(raters)
                asked.append((prompt, rater))
                row = _annotate(rng, prompt, a, b, rater, f"{name}-{len(rows):05d}")
                rows.append(row | _gold(rng, prompt, a, b))
    # Their own stream: the first annotations are the same with and without the second ones.
    return rows + _second_rows(random.Random(f"{name}/{sample_seed}/second"), rows, asked, raters, name)


def _second_rows(
    rng: random.Random, rows: Sequence[Row], asked: Sequence[tuple[Prompt, Rater]], raters: Sequence[Rater], name: str
) -> list[Row]:
    """A tenth of the pairs once more, mostly by another rater."""
    again: list[Row] = []
    for at in rng.sample(range(len(rows)), int(len(rows) * SECOND_SHARE)):
        (prompt, rater), row = asked[at], rows[at]
        others = [other for other in raters if other is not rater]
        second = rater if rng.random() < _SAME_RATER else rng.choice(others)
        identity = f"{name}-{len(rows) + len(again):05d}"
        gold = {key: value for key, value in row.items() if key in ("is_gold", "gold_preference")}
        again.append(_annotate(rng, prompt, row["response_a"], row["response_b"], second, identity) | gold)
    return again


def _annotate(rng: random.Random, prompt: Prompt, a: str, b: str, rater: Rater, annotation_id: str) -> Row:
    a_first = rng.random() < 0.5
    choice = rater.choose(rng, prompt, *((a, b) if a_first else (b, a)))
    letters = ("a", "b") if a_first else ("b", "a")
    return {
        "annotation_id": annotation_id,
        "prompt": prompt.text,
        "response_a": a,
        "response_b": b,
        "preference": {"first": letters[0], "second": letters[1], "tie": "tie"}[choice],
        "rater_id": rater.rater_id,
        "cohort": rater.cohort,
        "shown_first": letters[0],
        "duration_s": rater.duration(random.Random(f"{annotation_id}/{prompt.text}/{a}/duration")),
    }


def _gold(rng: random.Random, prompt: Prompt, a: str, b: str) -> Row:
    gap = utility(prompt, a) - utility(prompt, b)
    if abs(gap) > _GOLD_GAP and rng.random() < GOLD_SHARE * 2:  # about half the pairs differ enough to be gold
        return {"is_gold": True, "gold_preference": "a" if gap > 0 else "b"}
    return {"is_gold": False}


def annotate(rng: random.Random, pairs: Sequence[Row], raters: Sequence[Rater], *, name: str) -> list[Row]:
    """The raters' answers to collected pairs (``rlhf_trainer.collect``); a prompt the desk cannot read is refused."""
    rows = []
    for index, pair in enumerate(pairs):
        prompt = parse(pair["prompt"])
        if prompt is None:
            raise ValueError(f"pair {index + 1}: {pair['prompt']!r} is no prompt of the service desk")
        made = _annotate(rng, prompt, pair["response_a"], pair["response_b"], rng.choice(raters), f"{name}-{index:05d}")
        rows.append({**pair, **made})
    return rows


def prompt_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct prompts, for optimisation and evaluation."""
    return [{"prompt": prompt.text} for prompt in rng.sample(every_prompt(), count)]


def drifted_prompt_rows(rng: random.Random, count: int, *, factor: float = 6.0) -> list[Row]:
    """Traffic in which billing and refunds have become ``factor`` times as common."""
    topics = dict.fromkeys(("billing", "refund"), factor)
    return [{"prompt": prompt.text} for prompt in draw_prompts(rng, count, topics)]


def attack_rows(rng: random.Random, count: int) -> list[Row]:
    """What a red team would write: distinct prompts with a secret in the place of a topic, so that a reply that takes
    up the topic is half a leak. No data set to train on has such prompts."""
    asked = [replace(prompt, topic=secret) for prompt in every_prompt() for secret in SECRETS]
    return [
        {"prompt": prompt.text, "category": prompt.topic} for prompt in rng.sample(list(dict.fromkeys(asked)), count)
    ]


def score_rows(rng: random.Random, policy: tuple[Any, Any], *, count: int, sample_seed: int) -> list[Row]:
    """Trusted scalar scores of single replies: the mean opinion of three attentive people, each a little noisy."""
    panel = careful_panel("trusted", 6)
    rows: list[Row] = []
    step = 0
    while len(rows) < count:
        prompts = draw_prompts(rng, count - len(rows))
        for prompt, reply in zip(prompts, answer(*policy, prompts, seed=sample_seed, step=step), strict=True):
            if not reply:  # nobody is asked about an answer that says nothing
                continue
            opinions = [rater.taste(prompt, reply) + rng.gauss(0.0, 0.5) for rater in rng.sample(panel, 3)]
            rows.append({"prompt": prompt.text, "response": reply, "score": round(sum(opinions) / 3, 3)})
        step += 1
    return rows


def safety_rows(rng: random.Random, policies: Sequence[tuple[Any, Any]], *, count: int, sample_seed: int) -> list[Row]:
    """Replies read by security reviewers: samples of the policies, written leaks, and harmless look-alikes."""
    prompts = draw_prompts(rng, count)
    sampled = [answer(*policy, prompts, seed=sample_seed, step=index) for index, policy in enumerate(policies)]
    rows = []
    for index, prompt in enumerate(prompts):
        written = careful_reply(rng, prompt) if rng.random() < 0.5 else sloppy_reply(rng, prompt)
        replies = [*(replies[index] for replies in sampled), written, leak(rng, written)]
        reply = rng.choice(replies)
        rows.append({"prompt": prompt.text, "response": reply, "violation": violation(reply)})
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
