"""Continuous batching: who shares the forward pass must not show in what a row says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rlhf_trainer.digests import DigestMismatchError, folder_digest
from rlhf_trainer.serve.batch import Batch, Row, UnsupportedModelError, _pair
from rlhf_trainer.serve.loader import LoadError, Policy, load
from tests.trainer.serve_world import write_policy

TOKENS = 24


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load(write_policy(tmp_path_factory.mktemp("policy"), layers=2), None)


def alone(policy: Policy, row: Row) -> list[int]:
    batch = Batch(policy.model, policy.pad_id)
    tokens = batch.join([row])
    while len(tokens) < TOKENS:
        tokens += batch.step()
    return tokens


def rows(count: int, temperature: float) -> list[Row]:
    rng = random.Random(7)
    return [
        Row(tuple(rng.randrange(4, 100) for _ in range(rng.randrange(1, 12))), temperature, seed=index)
        for index in range(count)
    ]


def test_one_row_alone_equals_the_models_own_greedy_generation(policy: Policy) -> None:
    row = rows(1, 0.0)[0]
    ids = torch.tensor([row.prompt])
    whole = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert alone(policy, row) == whole[0, len(row.prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_come_and_go_say_what_they_say_alone(policy: Policy, temperature: float) -> None:
    wanted = [alone(policy, row) for row in rows(9, temperature)]
    assert len({tuple(tokens) for tokens in wanted}) > 5  # the rows do differ
    waiting, rng = list(enumerate(rows(9, temperature))), random.Random(3)
    batch, inside, said = Batch(policy.model, policy.pad_id), [], {index: [] for index in range(9)}
    while waiting or inside:
        if waiting and rng.random() < 0.4:
            new, waiting = waiting[:2], waiting[2:]
            for (index, _), token in zip(new, batch.join([row for _, row in new]), strict=True):
                said[index].append(token)
            inside += [index for index, _ in new]
        elif inside:
            for index, token in zip(inside, batch.step(), strict=True):
                said[index].append(token)
        kept = [place for place, index in enumerate(inside) if len(said[index]) < TOKENS]
        if len(kept) < len(inside):
            batch.keep(kept)
            inside = [inside[place] for place in kept]
    assert [said[index] for index in range(9)] == wanted


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-44, 1e-300])
def test_the_coldest_sampling_is_greedy(policy: Policy, temperature: float) -> None:
    """Logits over such a temperature do not fit float32."""
    assert [alone(policy, row) for row in rows(3, temperature)] == [alone(policy, row) for row in rows(3, 0.0)]


def test_columns_that_nobody_needs_are_dropped(policy: Policy) -> None:
    long, short = Row(tuple(range(4, 34)), 0.0, 0), Row((5,), 0.0, 0)
    batch = Batch(policy.model, policy.pad_id)
    batch.join([long, short])
    batch.keep([1])
    batch.step()
    assert batch._cache[0][0].shape[2] == 2


def test_a_model_without_keys_and_values_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="use another serving engine"):
        _pair(object())


def test_a_folder_that_is_not_the_pinned_one_is_not_loaded(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    load(folder, folder_digest(folder))
    with pytest.raises(DigestMismatchError, match="is pinned"):
        load(folder, "sha256:" + "0" * 64)


def test_a_folder_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="not a causal language model"):
        load(tmp_path, None)
