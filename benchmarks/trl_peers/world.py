"""What both sides train on: the same models on disk, the same prompts and pairs, with equal lengths or a spread.

``equal``: prompts of 8 tokens, replies of 24. ``spread``: prompts of 4 to 16, replies of 2 to 64, most of them short.
``prompts``: prompts of 64, replies of 24, as where something is summarised or answered from a text.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_trainer.data import recipe
from rlhf_trainer.data.encoding import Encoder, pad_right
from rlhf_trainer.models import reward
from rlhf_trainer.models.reward import RewardCalibration, RewardEnsemble, RewardMember, save_reward_model

PAD, BOS, EOS, UNK = range(4)
LONGEST, MEAN = 64, 16  # tokens of a spread response at most, and on average
EQUAL = 24
LENGTHS = {"equal": "equal lengths", "spread": "spread lengths", "prompts": "long prompts"}
LONGEST_PROMPT = {"equal": 8, "spread": 16, "prompts": 64}


def limit(lengths: str) -> int:
    """Tokens of a response at most."""
    return LONGEST if lengths == "spread" else EQUAL


def endless(lengths: str) -> bool:
    """Whether no response ends before the limit."""
    return lengths != "spread"


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    words: int
    rows: int  # responses (or pairs) of one step
    timed: int
    fitting: tuple[int, int]  # steps and rows of the fit to the lengths


SIZES = {"60k": Size(48, 2, 4, 120, 64, 50, (120, 64)), "10M": Size(320, 6, 8, 4000, 16, 50, (30, 16))}
PROMPTS, SAMPLES = 400, 4


def make(folder: Path, name: str) -> Path:
    """Models and data of one size below ``folder``, made once by this code."""
    sources = "".join(Path(module.__file__ or "").read_text() for module in (sys.modules[__name__], recipe, reward))
    target, size = folder / f"{name}-{hashlib.sha256(sources.encode()).hexdigest()[:10]}", SIZES[name]
    if (target / "done").exists():
        return target
    tokenizer, rng = _tokenizer(size.words), random.Random(0)
    policy = _policy(size)
    _fit(policy, size, rng)
    policy.save_pretrained(target / "policy")
    tokenizer.save_pretrained(target / "policy")
    config = LlamaConfig.from_pretrained(target / "policy", num_labels=1)
    torch.manual_seed(1)
    scorer = RewardEnsemble([RewardMember(LlamaForSequenceClassification(config))])
    folder = target / "reward"
    folder.mkdir(exist_ok=True)
    calibration = RewardCalibration(1.0, (0.0,), 0.1)
    save_reward_model(folder, scorer, scorer.state_dict(), Encoder(tokenizer), calibration)
    for lengths in LENGTHS:
        _rows(target / f"prompts-{lengths}.jsonl", ({"prompt": _prompt(size, rng, lengths)} for _ in range(PROMPTS)))
        pairs = []
        for _ in range(max(10 * size.rows, 200)):
            a, b = (_words(size, rng, _length(rng, lengths)) for _ in range(2))
            row = {"prompt": _prompt(size, rng, lengths), "response_a": a, "response_b": b, "preference": "a"}
            pairs.append({**row, "rater_id": "r", "is_gold": False})
        _rows(target / f"pairs-{lengths}.jsonl", pairs)
    (target / "done").touch()
    return target


def tokens_per_step(world: Path, size: Size, lengths: str, pairs: bool, reply: float) -> float:
    """Prompt and response tokens of one step, beginning and end of sequence included. Responses of pairs are those on
    disk, sampled ones have ``reply`` tokens on average."""
    name = f"{'pairs' if pairs else 'prompts'}-{lengths}.jsonl"
    rows = [json.loads(line) for line in (world / name).read_text().splitlines()]
    prompt = sum(len(row["prompt"].split()) + 1 for row in rows) / len(rows)
    if not pairs:
        return size.rows * (prompt + reply)
    replies = sum(len(row[key].split()) + 1 for row in rows for key in ("response_a", "response_b")) / len(rows)
    return size.rows * (2 * prompt + replies)


def _length(rng: random.Random, lengths: str) -> int:
    """Response tokens before the end of sequence."""
    return EQUAL - 1 if endless(lengths) else 1 + min(LONGEST - 2, int(rng.expovariate(1 / MEAN)))


def _prompt(size: Size, rng: random.Random, lengths: str) -> str:
    return _words(size, rng, rng.randint(3, 15) if lengths == "spread" else LONGEST_PROMPT[lengths] - 1)


def _words(size: Size, rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(4, size.words)}" for _ in range(count))


def _rows(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(words: int) -> Any:
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{index}" for index in range(4, words))]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **special)


def _policy(size: Size) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.words,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=128,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=True,
        )
    )


def _fit(policy: Any, size: Size, rng: random.Random) -> None:
    """Teaches the policy when responses end, so that what it samples has the spread of the pairs."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3 if size.width < 100 else 1e-3)
    steps, count = size.fitting
    for _ in range(steps):
        rows = []
        for _ in range(count):
            words = rng.randint(3, 15) + _length(rng, "spread")
            rows.append([BOS, *(rng.randrange(4, size.words) for _ in range(words)), EOS])
        ids, mask = pad_right(rows, PAD)
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        logits = policy(input_ids=ids).logits[:, :-1]
        torch.autograd.backward(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        optimizer.step()
        optimizer.zero_grad()
