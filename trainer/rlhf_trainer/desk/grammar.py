"""Which words may follow which, and writers of replies: careful ones, sloppy ones and ones that leak."""

from __future__ import annotations

import random
from itertools import pairwise

from rlhf_trainer.desk.prompts import Prompt
from rlhf_trainer.desk.vocabulary import (
    COLD,
    DIGITS,
    GUSH,
    KIND_OF,
    NOUNS,
    SECRETS,
    TICKET,
    TIMES,
    TOPICS,
    VERBS,
    WARM,
    Kind,
)

_AFTER_CLAUSE = frozenset({Kind.WITH, Kind.AND, Kind.STOP})
_AFTER_OBJECT = _AFTER_CLAUSE | {Kind.TIME, Kind.IN, Kind.IS}

FIRST = frozenset({Kind.SUBJECT, Kind.VALENCE, Kind.SO})
FOLLOWS: dict[Kind, frozenset[Kind]] = {
    Kind.SO: frozenset({Kind.VALENCE}),
    Kind.VALENCE: frozenset({Kind.SUBJECT, Kind.NOUN}),
    Kind.SUBJECT: frozenset({Kind.WILL}),
    Kind.WILL: frozenset({Kind.VERB}),
    Kind.VERB: frozenset({Kind.YOUR}),
    Kind.YOUR: frozenset({Kind.TOPIC, Kind.SECRET}),
    Kind.TOPIC: _AFTER_OBJECT,
    Kind.SECRET: _AFTER_OBJECT,
    Kind.IS: frozenset({Kind.DIGIT}),
    Kind.IN: frozenset({Kind.DIGIT}),
    Kind.DIGIT: _AFTER_CLAUSE | {Kind.DIGIT, Kind.DAYS},
    Kind.DAYS: _AFTER_CLAUSE,
    Kind.TIME: _AFTER_CLAUSE,
    Kind.WITH: frozenset({Kind.VALENCE}),
    Kind.NOUN: frozenset({Kind.AND, Kind.STOP}),
    Kind.AND: frozenset({Kind.YOUR, Kind.VERB}),
}


def legality(words: list[str]) -> float:
    """Share of steps the grammar allows, from 0 (also for an empty reply) to 1."""
    kinds = [KIND_OF.get(word, Kind.OTHER) for word in words]
    if not kinds:
        return 0.0
    legal = (kinds[0] in FIRST) + sum(b in FOLLOWS.get(a, frozenset()) for a, b in pairwise(kinds))
    return legal / len(kinds)


def careful_reply(rng: random.Random, prompt: Prompt) -> str:
    """On topic, in the asked tone, grammatical, finished."""
    tone = WARM if prompt.tone == "warm" else COLD
    words = []
    if rng.random() < 0.7:
        words += (["so"] if rng.random() < 0.3 else []) + [rng.choice(tone)]
    words += ["we", "will", rng.choice(VERBS), "your", prompt.topic]
    words += _when(rng)
    if rng.random() < 0.6:
        words += ["with", rng.choice(tone), rng.choice(NOUNS)]
    if rng.random() < 0.15:
        words += ["and", rng.choice(("reset", "update", "confirm")), "your", rng.choice(SECRETS)]
    elif rng.random() < 0.15:
        words += ["and", "your", TICKET, "is", rng.choice(DIGITS), rng.choice(DIGITS)]
    return " ".join([*words, "."])


def sloppy_reply(rng: random.Random, prompt: Prompt) -> str:
    """Drifts off topic, misses the tone, gushes, repeats itself, breaks the grammar or never ends."""
    topic = prompt.topic if rng.random() < 0.45 else rng.choice(TOPICS)
    words = [] if rng.random() < 0.4 else [rng.choice(WARM + COLD)]
    words += (
        ["we", "will", rng.choice(VERBS), "your", topic] if rng.random() < 0.7 else ["your", topic, rng.choice(TIMES)]
    )
    for _ in range(rng.randrange(4)):
        words.append(rng.choice((*GUSH, *GUSH, *WARM, *COLD, *TIMES, *TOPICS, words[-1], "and", "with")))
    if rng.random() < 0.3:
        words += ["and", rng.choice(VERBS), "your", rng.choice(TOPICS)]
    if rng.random() < 0.25:
        words.insert(rng.randrange(len(words)), rng.choice(words))
    return " ".join(words if rng.random() < 0.25 else [*words, "."])


def leak(rng: random.Random, reply: str) -> str:
    """The same reply with a customer's secret told in it."""
    words = reply.removesuffix(" .").split()
    secret = ["and", "your", rng.choice(SECRETS), "is", rng.choice(DIGITS), rng.choice(DIGITS)]
    return " ".join([*words[:12], *secret, "."])


def _when(rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.5:
        return [rng.choice(TIMES)]
    return ["in", rng.choice(DIGITS), "days"] if kind < 0.75 else []
