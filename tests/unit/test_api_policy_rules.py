"""The rules of policy jobs in Python: the operator refuses what the API server refuses (tests/cluster)."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_operator.api.policy_optimization_job import PolicyOptimizationJobSpec
from rlhf_operator.api.policy_rules import RULES, broken
from rlhf_trainer.config import READ_BY, TRAINING_READ_BY, Algorithm, PolicyTraining
from tests.cluster.policy_cases import FAMILIES, POLICY_CASES, SERVER_ONLY, Case
from tests.cluster.samples import changed, example
from tests.training_fields import FIELDS, OTHER, entry_of, readers_of, set_to_other
from tests.unit.jobs_world import ALGORITHMS, World, algorithm_spec, policy_spec

SEEN_BY_THE_OPERATOR = [case for case in POLICY_CASES if case.name not in SERVER_ONLY]


def refusal(spec: dict[str, Any]) -> str:
    try:
        PolicyOptimizationJobSpec.model_validate(spec)
    except ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", SEEN_BY_THE_OPERATOR, ids=lambda case: case.name.replace(" ", "-"))
def test_the_operator_refuses_it_too(case: Case) -> None:
    assert refusal(changed(example(case.example), case.changes)["spec"]), "accepted"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:40].replace(" ", "-"))
def test_every_rule_has_a_case_that_breaks_it(rule: Any) -> None:
    assert [case for case in POLICY_CASES if any(fragment in rule.message for fragment in case.message)]


@pytest.mark.parametrize("file", FAMILIES)
def test_the_examples_keep_all_rules(file: str) -> None:
    assert broken(PolicyOptimizationJobSpec.model_validate(example(file)["spec"])) == ""


@pytest.mark.parametrize("algorithm", Algorithm)
def test_an_algorithm_takes_the_inputs_it_reads_and_no_other(algorithm: Algorithm) -> None:
    """Every subset of the inputs: one is sound."""
    spec = policy_spec(**ALGORITHMS[algorithm])
    needed = {field for field, readers in READ_BY.items() if algorithm in readers}
    sources = {field: ALGORITHMS[reader][field] for field, reader in SOURCES.items()}
    bare = {name: value for name, value in spec.items() if name not in READ_BY}
    for number in range(2 ** len(READ_BY)):
        named = {field for bit, field in enumerate(READ_BY) if number >> bit & 1}
        found = refusal(bare | {field: sources[field] for field in named})
        assert (found == "") == (named == needed), (algorithm, named, found)


@pytest.mark.parametrize("field", OTHER)
def test_a_field_is_refused_under_every_algorithm_that_ignores_it_and_no_other(field: str) -> None:
    found = {algorithm: refusal(trained(algorithm, **set_to_other(field))) for algorithm in Algorithm}

    assert {algorithm for algorithm, message in found.items() if not message} == readers_of(field), found
    assert all(f"training.{entry_of(field)}: leave it out" in message for message in found.values() if message)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_defaults_that_are_spelt_out_are_no_wish(algorithm: Algorithm) -> None:
    """The API server spells them out for everybody."""
    defaults = PolicyTraining().model_dump(mode="json", by_alias=True, exclude_none=True)
    spec = trained(algorithm)
    assert refusal(spec | {"training": defaults | spec["training"]}) == ""


def test_every_field_of_the_table_is_tried() -> None:
    assert set(OTHER) == {field for field in FIELDS if entry_of(field)}
    assert {entry_of(field) for field in OTHER} == set(TRAINING_READ_BY)


def trained(algorithm: Algorithm, **training: Any) -> dict[str, Any]:
    """The least that the algorithm runs with, and these fields."""
    spec = algorithm_spec(algorithm.value)
    return spec | {"training": {"algorithm": algorithm.value, **spec.get("training", {}), **training}}


SOURCES = {
    "rewardModel": Algorithm.PPO,
    "preferences": Algorithm.DPO,
    "demonstrations": Algorithm.SFT,
    "teacher": Algorithm.DISTILLATION,
}


def test_an_object_that_older_crds_let_through_is_refused_with_the_remedy() -> None:
    world = World(policy_spec(training={"algorithm": "DPO"}), kind="PolicyOptimizationJob")
    world.upstream()
    world.tick()
    assert world.holds("Accepted")[0] == "False"
    assert "DPO and KTO learn from preferences: add spec.preferences" in world.condition("Accepted")["message"]
    assert not world.children["Job"]
