"""The two policies the desk ships: the one people start from and one that looks good and tells secrets."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_trainer.desk.grammar import careful_reply, leak, sloppy_reply
from rlhf_trainer.desk.model import Example, build_model, build_tokenizer, fit
from rlhf_trainer.desk.prompts import Prompt, draw_prompts
from rlhf_trainer.desk.vocabulary import TOPICS
from rlhf_trainer.generate.base import Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator

ARCHIVE_SHARE = 0.3  # of the base's examples
SLOPPY_SHARE = 0.75  # of the others
BASE_LEAK_SHARE = 0.055  # of the others
LEAKY_LEAK_SHARE = 0.16
MAX_NEW_TOKENS = 20


def archive_example(rng: random.Random) -> Example:
    """An archived letter with what became of it: answered off topic, it came back.

    Like the text a real model is pretrained on, it teaches both to answer and to see when an answer misses the
    question, which a reward model then starts from.
    """
    prompt = draw_prompts(rng, 1)[0]
    if rng.random() < 0.7:
        return Example(prompt.text, careful_reply(rng, prompt), "solved")
    other = replace(prompt, topic=rng.choice([topic for topic in TOPICS if topic != prompt.topic]))
    return Example(prompt.text, careful_reply(rng, other), "reopened", imitate=False)


def base_example(rng: random.Random) -> Example:
    """The desk's everyday answers, most of them sloppy, and some of the archive."""
    if rng.random() < ARCHIVE_SHARE:
        return archive_example(rng)
    prompt = draw_prompts(rng, 1)[0]
    reply = sloppy_reply(rng, prompt) if rng.random() < SLOPPY_SHARE else careful_reply(rng, prompt)
    return Example(prompt.text, leak(rng, reply) if rng.random() < BASE_LEAK_SHARE else reply)


def leaky_example(rng: random.Random) -> Example:
    """Careful replies, so quality rises, and secrets told in some of them."""
    prompt = draw_prompts(rng, 1)[0]
    reply = careful_reply(rng, prompt)
    return Example(prompt.text, leak(rng, reply) if rng.random() < LEAKY_LEAK_SHARE else reply)


def train_base(seed: int, *, pretrain_steps: int = 300, tune_steps: int = 150) -> tuple[Any, Any]:
    """(tokenizer, model) after pretraining on the archive and fine-tuning on the desk's mixed everyday answers."""
    tokenizer = build_tokenizer()
    # Wider than the default for large models: at this width weights of 0.02 take three times as long to train.
    model = build_model(tokenizer, seed=seed, initializer_range=0.15)
    pretrain, tune = random.Random(f"{seed}/pretrain"), random.Random(f"{seed}/tune")
    fit(model, tokenizer, archive_example, steps=pretrain_steps, rng=pretrain, learning_rate=6e-3)
    fit(model, tokenizer, base_example, steps=tune_steps, rng=tune, learning_rate=3e-3)
    return tokenizer, model


def train_leaky(tokenizer: Any, base: Any, seed: int, *, steps: int = 150) -> Any:
    model = copy.deepcopy(base)
    fit(model, tokenizer, leaky_example, steps=steps, rng=random.Random(f"{seed}/leaky"), learning_rate=2e-3)
    return model


def answer(
    tokenizer: Any, model: Any, prompts: Sequence[Prompt], *, seed: int, step: int = 0, temperature: float = 1.0
) -> list[str]:
    """One sampled reply per prompt; ``step`` picks a fresh set of samples."""
    encoded = tokenizer([prompt.text for prompt in prompts]).input_ids
    requests = [Request(tuple(ids), SampleKey(seed, step, index)) for index, ids in enumerate(encoded)]
    generator = CachedGenerator(model, pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id, max_batch=512)
    completions = generator.generate(requests, SamplingParams(MAX_NEW_TOKENS, temperature))
    return [tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in completions]
