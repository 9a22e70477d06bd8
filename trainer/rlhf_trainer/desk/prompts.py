"""What customers write: a topic, a tone they want answered in, and some variety around them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_trainer.desk.vocabulary import OPENERS, PROBLEMS, TONES, TOPICS


@dataclass(frozen=True)
class Prompt:
    opener: str
    topic: str
    problem: str
    tone: str

    @property
    def text(self) -> str:
        return f"{self.opener} my {self.topic} is {self.problem} be {self.tone}"


def parse(text: str) -> Prompt | None:
    """The prompt a text stands for; None when it is not one of ours (a live user may write anything)."""
    words = text.lower().split()
    topic = next((word for word in words if word in TOPICS), None)
    tone = next((word for word in words if word in TONES), None)
    if topic is None or tone is None:
        return None
    opener = next((word for word in words if word in OPENERS), OPENERS[0])
    problem = next((word for word in words if word in PROBLEMS), PROBLEMS[0])
    return Prompt(opener, topic, problem, tone)


def every_prompt() -> list[Prompt]:
    """All prompts there are, in a fixed order."""
    return [Prompt(o, t, p, tone) for o, t, p, tone in itertools.product(OPENERS, TOPICS, PROBLEMS, TONES)]


def draw_prompts(rng: random.Random, count: int, topic_weights: Mapping[str, float] | None = None) -> list[Prompt]:
    """``count`` prompts with replacement; ``topic_weights`` (default 1) shifts the mix of topics: drift."""
    weights = [(topic_weights or {}).get(topic, 1.0) for topic in TOPICS]
    topics = rng.choices(TOPICS, weights, k=count)
    return [Prompt(rng.choice(OPENERS), topic, rng.choice(PROBLEMS), rng.choice(TONES)) for topic in topics]
