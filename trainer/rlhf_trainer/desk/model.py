"""The desk's language model: an ordinary Hugging Face Llama of about 60,000 parameters and its word tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_trainer.data.encoding import pad_right
from rlhf_trainer.desk.vocabulary import WORDS

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_SPECIALS = (PAD, BOS, EOS, UNK)
_OUTCOME_WEIGHT = 12.0  # one token against the dozen of a reply


@dataclass(frozen=True)
class Example:
    """A prompt and what follows it; the reply and its end are learnt, and the outcome noted after the end, if any.

    Replies end with the end of sequence, so an outcome is never sampled; it is there to be understood.
    """

    prompt: str
    reply: str
    outcome: str = ""
    imitate: bool = True  # False: only the outcome is learnt


def build_tokenizer() -> Any:
    """One token per word, begin-of-sequence added in front of prompts; pad and end of sequence differ."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIALS, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        chat_template="{{ messages[-1]['content'] }}",
    )


def build_model(
    tokenizer: Any, *, width: int = 48, layers: int = 2, seed: int = 0, initializer_range: float = 0.02
) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
    return LlamaForCausalLM(config)


def fit(
    model: Any,
    tokenizer: Any,
    examples: Callable[[random.Random], Example],
    *,
    steps: int,
    rng: random.Random,
    batch_size: int = 64,
    learning_rate: float,
) -> float:
    """Train on fresh examples (AdamW, cosine schedule); the mean loss of the last tenth, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 20)
    model.train()
    losses: list[float] = []
    for _ in range(steps):
        ids, weights = _collate(tokenizer, [examples(rng) for _ in range(batch_size)])
        logits = model(input_ids=ids).logits[:, :-1]
        surprise = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (surprise * weights[:, 1:].flatten()).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _collate(tokenizer: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and how much each token counts (B, T), prompt and padding nothing."""
    prompts = tokenizer([e.prompt for e in examples]).input_ids
    replies = tokenizer([e.reply for e in examples], add_special_tokens=False).input_ids
    outcomes = tokenizer([e.outcome for e in examples], add_special_tokens=False).input_ids
    rows = [[*p, *r, tokenizer.eos_token_id, *o] for p, r, o in zip(prompts, replies, outcomes, strict=True)]
    ids, mask = pad_right(rows, tokenizer.pad_token_id)
    weights = mask.float()
    for index, (example, prompt, outcome) in enumerate(zip(examples, prompts, outcomes, strict=True)):
        end = len(rows[index]) - len(outcome)
        weights[index, : len(prompt) if example.imitate else end] = 0.0
        weights[index, end : len(rows[index])] = _OUTCOME_WEIGHT
    return ids, weights
