"""The table of who reads which field: each algorithm's run reads what the table says, and the rest is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.config import ACTS_WHEN, ONLINE, Algorithm, Condition, PolicyTraining, Spec
from rlhf_trainer.exits import Invalid
from rlhf_trainer.loops.policy_needs import check_fields
from rlhf_trainer.wire import FailureClass
from tests.trainer import ppo_world
from tests.trainer.attempts import run_here
from tests.trainer.offline_world import OfflineWorld, make_offline_world, training_of
from tests.trainer.ppo_world import NO_GATE
from tests.trainer.training_world import TinyWorld
from tests.training_fields import FIELDS, IN_LOSS, OTHER, entry_of, readers_of, set_to_other

# Read under algorithms that then make nothing of it: one sample per text, multipliers that only reorder samples.
READ_IN_VAIN = {"samplesPerPrompt", "constraints"}
# Where fields are only checked, or sample replies for the gate after training.
ASIDE = tuple(f"rlhf_trainer.{name}" for name in ("config", "preflight", "loops.policy_needs", "loops.policy_gate"))


@pytest.mark.parametrize("field", OTHER)
def test_a_field_is_refused_under_every_algorithm_that_ignores_it_and_no_other(field: str) -> None:
    found = {algorithm: refusal(algorithm, **set_to_other(field)) for algorithm in Algorithm}

    assert {algorithm for algorithm, message in found.items() if not message} == readers_of(field), found
    remedy = f"leave out training.{entry_of(field)}: {{}} does not read it"
    assert all(remedy.format(algorithm.value) in message for algorithm, message in found.items() if message)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_defaults_that_are_spelt_out_are_no_wish(algorithm: Algorithm) -> None:
    assert refusal(algorithm, **PolicyTraining().model_dump(exclude={"algorithm", "samples_per_prompt"})) == ""


IN_VAIN: dict[str, tuple[Algorithm, dict[str, Any], dict[str, Any]]] = {
    # field → an algorithm that reads it, the field beside what makes it idle, and beside what makes it act
    "kl.target": (Algorithm.PPO, {"kl": {"target": 2, "controller": "fixed"}}, {"kl": {"target": 2}}),
    "kl.horizon": (Algorithm.RLOO, {"kl": {"horizon": 9, "controller": "fixed"}}, {"kl": {"horizon": 9}}),
    "ppo.targetKl": (
        Algorithm.GRPO,
        {"ppo": {"targetKl": 0.1, "epochs": 1}},
        {"ppo": {"targetKl": 0.1, "epochs": 2}},
    ),
    "distillation.beta": (
        Algorithm.DISTILLATION,
        {"distillation": {"beta": 0.9}},
        {"distillation": {"beta": 0.9, "divergence": "jensenShannon"}},
    ),
    "distillation.divergence": (
        Algorithm.DISTILLATION,
        {"distillation": {"divergence": "reverse", "mode": "sequence"}},
        {"distillation": {"divergence": "reverse"}},
    ),
    "distillation.onPolicyFraction": (
        Algorithm.DISTILLATION,
        {"distillation": {"onPolicyFraction": 1, "mode": "sequence"}},
        {"distillation": {"onPolicyFraction": 1}},
    ),
}


@pytest.mark.parametrize("condition", ACTS_WHEN, ids=lambda condition: str(condition.field))
def test_a_field_that_another_makes_idle_is_refused_and_accepted_where_it_acts(condition: Condition) -> None:
    algorithm, idle, acting = IN_VAIN[condition.field]
    said = f"leave out training.{condition.field}: it does nothing unless {condition.says}"
    assert refusal(algorithm, **idle) == said
    assert refusal(algorithm, **acting) == ""


def test_no_controller_moves_a_coefficient_of_0() -> None:
    """It multiplies, so a target beside it is never aimed at."""
    said = refusal(Algorithm.PPO, kl={"coefficient": 0, "target": 2})
    assert said.startswith("leave out training.kl.target: it does nothing unless")
    assert refusal(Algorithm.PPO, kl={"coefficient": 0}) == ""


def test_a_sequence_has_no_divergence_to_weigh_the_teacher_in() -> None:
    settings = {"mode": "sequence", "divergence": "jensenShannon", "beta": 0.9}
    assert "leave out training.distillation.divergence" in refusal(Algorithm.DISTILLATION, distillation=settings)


def refusal(algorithm: Algorithm, **training: Any) -> str:
    grouped = {"samplesPerPrompt": 2} if algorithm in ONLINE else {}
    try:
        check_fields(PolicyTraining.model_validate({"algorithm": algorithm, **grouped, **training}))
    except Invalid as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="module")
def world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> OfflineWorld:
    return make_offline_world(tmp_path_factory.mktemp("fields-world"), tiny_world)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_run_reads_the_fields_that_the_table_says(algorithm: Algorithm, world: OfflineWorld, tmp_path: Path) -> None:
    once = {"steps": 1, "prompts_per_step": 4, "tracking": {"tracker": "tensorboard"}}
    if algorithm in ONLINE:  # with the KL in the loss, or nobody would ask for its estimator
        training = ppo_world.training_of(algorithm=algorithm, samples_per_prompt=2, kl=IN_LOSS, **once)
        config = world.policy.config(tmp_path, training=training, evaluation=NO_GATE)
    else:
        mixed = {"distillation": {"divergence": "jensenShannon"}} if algorithm is Algorithm.DISTILLATION else {}
        config = world.config(tmp_path, training_of(algorithm.value, **once, **mixed))

    with recorded() as read:
        result = run_here(config)

    assert result.failure_class is FailureClass.SUCCESS, result.message
    expected = {field for field in FIELDS if algorithm in readers_of(field)}
    assert expected - read == set(), "the table says that these are read"
    assert read - expected - READ_IN_VAIN == set(), "the table says that these are not read"


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The fields of a policy's training that training reads meanwhile."""
    read: set[str] = set()
    paths = {held: path for path, held in FIELDS.items()}

    def reading(self: Spec, name: str) -> Any:
        path = paths.get((type(self), name))
        if path is not None and not sys._getframe(1).f_globals["__name__"].startswith(ASIDE):
            read.add(path)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spec, "__getattribute__", reading, raising=False)
        yield read
