"""Supervised loss against Hugging Face's own cross entropy, and its mean over all tokens of a step."""

from __future__ import annotations

import pytest
import torch

from rlhf_trainer.algos.supervised import token_cross_entropy
from rlhf_trainer.data.encoding import pad_right
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.models.critic import Actor
from rlhf_trainer.models.policy import Batch

ROWS = [((1, 5, 6), (8, 9, 2)), ((1, 7), (10, 11, 12, 13, 2)), ((1, 9, 9, 9), (2,))]
TOKENS = sum(len(response) for _, response in ROWS)


def policy() -> Actor:
    return Actor(build_model(build_tokenizer(), width=16, layers=1, seed=1, initializer_range=0.2)).eval()


def loss_of(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], tokens: int) -> torch.Tensor:
    batch = Batch.of([p for p, _ in rows], [r for _, r in rows], 0, torch.device("cpu"))
    logprobs, _, _ = policy()(batch, 1.0)
    return token_cross_entropy(logprobs, batch.mask(), tokens)


def test_it_is_the_cross_entropy_of_hugging_face_on_the_same_tokens() -> None:
    ids, attention = pad_right([[*prompt, *response] for prompt, response in ROWS], 0)
    labels = ids.masked_fill(attention == 0, -100)
    for index, (prompt, _) in enumerate(ROWS):
        labels[index, : len(prompt)] = -100
    theirs = policy().lm(input_ids=ids, attention_mask=attention, labels=labels).loss
    torch.testing.assert_close(loss_of(ROWS, TOKENS), theirs, atol=1e-6, rtol=1e-5)


def test_shares_of_micro_batches_add_up_to_the_whole() -> None:
    parts = sum(float(loss_of([row], TOKENS).detach()) for row in ROWS)
    assert parts == pytest.approx(float(loss_of(ROWS, TOKENS).detach()), rel=1e-5)
    # Negative control: the mean of each part's own mean weighs short responses more.
    own = sum(float(loss_of([row], len(row[1])).detach()) for row in ROWS) / len(ROWS)
    assert abs(own - parts) > 0.01
