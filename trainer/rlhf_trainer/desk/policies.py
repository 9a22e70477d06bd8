"""The two policies the desk ships: the one people start from and one that looks good and tells secrets."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from rlhf_trainer.desk.grammar import careful_reply, leak, sloppy_reply
from rlhf_trainer.desk.model import Example, build_model, build_tokenizer, fit
from rlhf_trainer.desk.prompts import Prompt, draw_prompts
from rlhf_trainer.generate.base import Request, SampleKey, SamplingParams
from rlhf_trainer.generate.cached import CachedGenerator

SLOPPY_SHARE = 0.55
BASE_LEAK_SHARE = 0.04
LEAKY_LEAK_SHARE = 0.16
MAX_NEW_TOKENS = 20


def base_example(rng: random.Random) -> Example:
    prompt = draw_prompts(rng, 1)[0]
    reply = sloppy_reply(rng, prompt) if rng.random() < SLOPPY_SHARE else careful_reply(rng, prompt)
    return Example(prompt.text, leak(rng, reply) if rng.random() < BASE_LEAK_SHARE else reply)


def leaky_example(rng: random.Random) -> Example:
    """Careful replies, so quality rises, and secrets told in some of them."""
    prompt = draw_prompts(rng, 1)[0]
    reply = careful_reply(rng, prompt)
    return Example(prompt.text, leak(rng, reply) if rng.random() < LEAKY_LEAK_SHARE else reply)


def archive_example(rng: random.Random) -> Example:
    """Pretraining text, an archive of good letters: topic and tone of the question are copied from here on."""
    prompt = draw_prompts(rng, 1)[0]
    return Example(prompt.text, careful_reply(rng, prompt))


def train_base(seed: int, *, pretrain_steps: int = 450, tune_steps: int = 200) -> tuple[Any, Any]:
    """(tokenizer, model) after pretraining on the archive and fine-tuning on the desk's mixed everyday answers."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
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
