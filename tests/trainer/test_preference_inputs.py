"""What algorithms that learn from given texts are given: the right inputs, rows that fit, a reference that is right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhf_trainer.config import Evaluation, PolicyTraining
from rlhf_trainer.data.encoding import Encoder
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.batching import micro_rows
from rlhf_trainer.loops.given_texts import Limits, Text, read_demonstrations, read_pairs, single_responses
from rlhf_trainer.loops.policy_needs import check_needs
from rlhf_trainer.loops.reference_cache import cached_logprobs, sequence_logprobs
from rlhf_trainer.loops.rollout import Prompt
from rlhf_trainer.wire import AttemptConfig, Located
from tests.trainer.offline_world import OfflineWorld, make_offline_world, training_of
from tests.trainer.training_world import TinyWorld, write_rows


@pytest.fixture(scope="module")
def offline_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> OfflineWorld:
    return make_offline_world(tmp_path_factory.mktemp("offline-inputs"), tiny_world)


@pytest.fixture(scope="module")
def encoder(tiny_world: TinyWorld) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny_world.base))


SOMETHING = Located(path="/somewhere")
TEACHER = Evaluation.model_validate({"against": "teacher"})
LIMIT = {"cost": "length", "limit": 5}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("DPO", {"preferences": None}, {}, r"spec.preferences is missing: DPO learns from it; give a JSONL"),
    ("KTO", {"preferences": None}, {}, r"spec.preferences is missing"),
    ("SFT", {"demonstrations": None}, {}, r"spec.demonstrations is missing"),
    ("Distillation", {"teacher": None}, {}, r"spec.teacher is missing"),
    ("Distillation", {"prompts": None}, {}, r"spec.prompts is missing"),
    ("DPO", {"teacher": SOMETHING}, {}, r"spec.teacher is given, but DPO makes no use of it; .* Distillation"),
    ("KTO", {"reward_model": SOMETHING}, {}, r"spec.rewardModel is given, but KTO .* PPO, GRPO"),
    ("SFT", {"preferences": SOMETHING}, {}, r"spec.preferences is given, but SFT .* DPO, KTO"),
    ("Distillation", {"demonstrations": SOMETHING}, {}, r"spec.demonstrations is given"),
    ("DPO", {}, {"constraints": [LIMIT]}, r"leave out training.constraints: DPO does not read it, PPO, GRPO"),
    ("Distillation", {}, {"generation": {"engine": "vllm"}}, r"training.generation.engine: Distillation does not"),
    ("DPO", {"evaluation": TEACHER}, {}, r"evaluation.against is teacher, but DPO has none"),
    ("Distillation", {"evaluation": TEACHER}, {}, r"against is teacher, but nothing can judge"),
]


@pytest.mark.parametrize(("algorithm", "inputs", "settings", "message"), REFUSED)
def test_missing_and_useless_inputs_are_refused_with_the_remedy(
    offline_world: OfflineWorld, algorithm: str, inputs: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    training = training_of(algorithm, **settings)
    with pytest.raises(Invalid, match=message):
        check_needs(offline_world.config(Path("/out"), training, **inputs), training)


@pytest.mark.parametrize("algorithm", ["DPO", "KTO", "SFT", "Distillation"])
def test_what_an_algorithm_needs_is_enough(offline_world: OfflineWorld, algorithm: str) -> None:
    training = training_of(algorithm)
    check_needs(offline_world.config(Path("/out"), training), training)
    check_needs(offline_world.config(Path("/out"), training, audit_reward_model=SOMETHING, prompts=SOMETHING), training)


def test_all_fields_that_were_set_for_nothing_are_named_at_once(offline_world: OfflineWorld) -> None:
    ignored = {"kto": {"beta": 0.2}, "ppo": {"gae_lambda": 0.9, "epochs": 1}}
    training = PolicyTraining.model_validate({"algorithm": "GRPO", "samples_per_prompt": 2, **ignored})
    with pytest.raises(Invalid) as refused:
        check_needs(offline_world.policy.config(Path("/out"), training=training), training)
    assert str(refused.value) == (
        "leave out training.ppo.gaeLambda: GRPO does not read it, PPO would; "
        "leave out training.kto: GRPO does not read it, KTO would"
    )


def test_only_online_algorithms_insist_on_a_reward_model(offline_world: OfflineWorld) -> None:
    training = training_of("PPO")
    config = offline_world.policy.config(Path("/out"), training=training, reward_model=None)
    with pytest.raises(Invalid, match=r"spec.rewardModel is missing: PPO learns from it; name a RewardModelJob"):
        check_needs(config, training)


def pair(prompt: str, chosen: str, rejected: str, preference: str = "a") -> dict[str, str]:
    return {"prompt": prompt, "response_a": chosen, "response_b": rejected, "preference": preference}


def test_rows_that_do_not_fit_are_dropped_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    rows = [
        pair("hello", "glad", "sorry"),
        pair("hello", "glad", "sorry", "b"),
        pair("hello", "glad", "sorry", "tie"),
        pair("hello " * 9, "glad", "sorry"),
        pair("hello", "glad", "sorry " * 9),
        pair("hello", "glad glad glad", "sorry"),  # three words and the end of sequence: exactly the limit
    ]
    pairs, dropped = read_pairs(str(write_rows(tmp_path / "rows.jsonl", rows)), encoder, Limits(4, 4))
    assert (len(pairs), dropped) == (4, 2)
    glad, sorry = (tuple(encoder.response(word)) for word in ("glad", "sorry"))
    assert [(p.chosen, p.rejected, p.probability) for p in pairs[:3]] == [
        (glad, sorry, 1.0),
        (sorry, glad, 1.0),
        (glad, sorry, 0.5),
    ]
    texts, desirable = single_responses(pairs, "rows.jsonl")
    assert [text.response for text in texts[:4]] == [glad, sorry, sorry, glad]
    assert desirable == [True, False] * 3  # the tie says neither


def test_data_that_mostly_does_not_fit_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"prompt": "hello", "response": "glad " * 9}] * 2 + [{"prompt": "hello", "response": "glad"}]
    with pytest.raises(Invalid, match=r"2 of 3 rows have more than 4 tokens .* training.generation.maxNewTokens"):
        read_demonstrations(str(write_rows(tmp_path / "rows.jsonl", rows)), encoder, Limits(4, 4))


def test_a_file_that_loses_most_of_its_rows_to_two_limits_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    """4 of 10 prompts are too long, and 3 responses of the 6 others: neither is more than half, together they are."""
    rows = [{"prompt": "hello " * 9, "response": "glad"}] * 4
    rows += [{"prompt": "hello", "response": "glad " * 9}] * 3 + [{"prompt": "hello", "response": "glad"}] * 3
    with pytest.raises(Invalid, match=r"7 of 10 rows .* 4 by training.maxPromptLength 4 .* 3 by .*maxNewTokens 4"):
        read_demonstrations(str(write_rows(tmp_path / "rows.jsonl", rows)), encoder, Limits(4, 4))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "hello"}, "field 'response' is missing"), ({"prompt": "hello", "response": " "}, "empty")],
)
def test_a_bad_demonstration_is_named(tmp_path: Path, encoder: Encoder, row: dict[str, str], message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello", "response": "glad"}, row])
    with pytest.raises(Invalid, match=rf"rows.jsonl:2: .*{message}"):
        read_demonstrations(str(path), encoder, Limits(4, 4))


def test_ties_alone_make_nothing_good_or_bad(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [pair("hello", "glad", "sorry", "tie")])
    pairs, _ = read_pairs(str(path), encoder, Limits(4, 4))
    with pytest.raises(Invalid, match="every training row is a tie"):
        single_responses(pairs, str(path))


def test_micro_batches_divide_the_rows_of_a_rank() -> None:
    assert micro_rows(training_of("DPO", micro_batch_size=2), 8, 2) == 2
    assert micro_rows(training_of("DPO"), 8, 2) == 8
    assert micro_rows(training_of("DPO", max_prompt_length=8185), 8, 2) == 2  # 2 x 2 x 8192 tokens fit a pass
    with pytest.raises(Invalid, match=r"training.microBatchSize is 3, which does not divide the 8 rows"):
        micro_rows(training_of("DPO", micro_batch_size=3), 8, 2)


TEXTS = [Text(Prompt("hello", (1, 5, 6)), response) for response in ((8, 9, 2), (7, 2), (8, 2))]


class Cached:
    """The cache of one run, as rank 0 of one uses it."""

    def __init__(self, run: Path, model: Path) -> None:
        one = SimpleNamespace(size=1, rank=0, is_main=True, broadcast=lambda x: x, gather=lambda x: [x])
        config = SimpleNamespace(output=Located(path=str(run)))
        self.passes = 0
        self._session: Any = SimpleNamespace(world=one, config=config, pulse=self._pulse)
        self._model, self.folder = Located(path=str(model)), run / "reference-logprobs"
        self._lm = build_model(build_tokenizer(), width=16, layers=1, seed=1)

    def _pulse(self) -> None:
        self.passes += 1

    def __call__(self, texts: list[Text] = TEXTS, temperature: float = 1.0) -> torch.Tensor:
        return cached_logprobs(self._session, self._model, self._lm, texts, 0, temperature)

    def right(self) -> torch.Tensor:
        return torch.cat([sequence_logprobs(self._lm, [text], 0, 1.0) for text in TEXTS])


def test_reference_log_probabilities_are_kept_and_checked(tmp_path: Path, tiny_world: TinyWorld) -> None:
    cached = Cached(tmp_path, tiny_world.base)
    first = cached()
    torch.testing.assert_close(first, cached.right())
    assert torch.equal(cached(), first)
    assert cached.passes == 1  # the second came from disk
    (file,) = cached.folder.iterdir()
    tampered = {name: value + 1.0 for name, value in load_file(file).items()}
    save_file(tampered, file, metadata={"sha256": "0" * 64})
    assert torch.equal(cached(), first)
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(cached(), first)
    assert cached.passes == 3  # each time computed anew
    assert torch.equal(cached(), first)
    assert cached.passes == 3  # and written anew


def test_other_texts_or_another_temperature_are_other_numbers(tmp_path: Path, tiny_world: TinyWorld) -> None:
    cached = Cached(tmp_path, tiny_world.base)
    first = cached()
    assert not torch.allclose(cached(temperature=0.5), first)
    assert torch.allclose(cached(TEXTS[::-1]), first.flip(0))
    assert len(list(cached.folder.iterdir())) == 3


def test_configuration_survives_the_wire(offline_world: OfflineWorld) -> None:
    config = offline_world.config(Path("/out"), training_of("Distillation"))
    assert AttemptConfig.model_validate_json(config.to_json()) == config
