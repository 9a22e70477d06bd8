"""The CRD generator says everything that a structural schema can carry, and refuses the rest by path."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, create_model

from rlhf_operator.api.meta import ApiSpec, ApiStatus, Cel, IntOrString, ListMap, ListSet, PreserveUnknown
from rlhf_operator.api.structural import NotStructuralError, structural_schema

Text = Annotated[str, Field(max_length=10)]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Engine(ApiSpec):
    """Two lines
    of text."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    cel_rules: ClassVar[tuple[Cel, ...]] = (Cel("self.zeroStage < 3", "not three", field_path=".zeroStage"),)


class Named(ApiSpec):
    name: Text


def properties(model: type[ApiSpec]) -> dict[str, Any]:
    found: dict[str, Any] = structural_schema(model)["properties"]
    return found


@pytest.mark.parametrize("bound", [Field(ge=0.5), Field(gt=0.5), Field(lt=0.5), Field(le=-0.5)])
def test_a_bound_that_the_server_would_cut_to_a_whole_number_is_refused(bound: Any) -> None:
    """As kube-apiserver 1.35 does: 0 is "not less than 0.5", and 0 is at least 0.5."""
    with pytest.raises(NotStructuralError, match=r"rate: .* is cut to .*; use a whole bound"):
        properties(create_model("Model", __base__=ApiSpec, rate=(Annotated[float, bound], 1.0)))


@pytest.mark.parametrize("bound", [Field(le=0.5), Field(ge=-0.5)])
def test_a_bound_whose_whole_part_says_the_same_of_whole_numbers_is_kept(bound: Any) -> None:
    [rate] = properties(create_model("Model", __base__=ApiSpec, rate=(Annotated[float, bound], 0.0))).values()
    assert 0.5 in (rate.get("maximum"), -rate.get("minimum", 0))


def test_numbers_bounds_enums_and_constants() -> None:
    class Model(ApiSpec):
        rate: Annotated[float, Field(gt=0.0, lt=2.0)] = 1.0
        count: Annotated[int, Field(ge=1)] = 3
        colour: Colour = Colour.RED
        only: Literal["PPO"] = "PPO"

    assert properties(Model) == {
        "rate": {
            "type": "number",
            "minimum": 0,
            "exclusiveMinimum": True,
            "maximum": 2,
            "exclusiveMaximum": True,
            "default": 1,
        },
        "count": {"type": "integer", "minimum": 1, "default": 3},
        "colour": {"type": "string", "enum": ["red", "blue"], "default": "red"},
        "only": {"type": "string", "enum": ["PPO"], "default": "PPO"},
    }


def test_an_optional_field_is_its_type_and_not_required() -> None:
    class Model(ApiSpec):
        maybe: Annotated[int, Field(ge=1)] | None = None
        must: bool

    schema = structural_schema(Model)

    assert schema["properties"]["maybe"] == {"type": "integer", "minimum": 1}
    assert schema["required"] == ["must"]


def test_references_are_inlined_with_their_rules_and_the_fields_own() -> None:
    class Model(ApiSpec):
        engine: Annotated[Engine | None, Cel("self.zeroStage > 0", "not zero")] = Field(None, description="The engine.")

    engine = properties(Model)["engine"]

    assert engine["description"] == "The engine."
    assert engine["properties"]["zeroStage"]["default"] == 2
    assert engine["x-kubernetes-validations"] == [
        {
            "rule": "self.zeroStage < 3",
            "message": "not three",
            "reason": "FieldValueInvalid",
            "fieldPath": ".zeroStage",
        },
        {"rule": "self.zeroStage > 0", "message": "not zero", "reason": "FieldValueInvalid"},
    ]


def test_a_docstring_becomes_one_line() -> None:
    assert structural_schema(Engine)["description"] == "Two lines of text."


@pytest.mark.parametrize(
    ("default", "expected"), [(Engine(), {}), (Engine(zero_stage=1), {"zeroStage": 1})], ids=["plain", "changed"]
)
def test_the_default_of_an_object_holds_only_what_differs(default: Engine, expected: dict[str, Any]) -> None:
    class Model(ApiSpec):
        engine: Engine = default

    assert properties(Model)["engine"]["default"] == expected


def test_a_default_factory_is_a_default_unless_it_makes_something_empty() -> None:
    class Model(ApiSpec):
        engine: Engine = Field(default_factory=Engine)
        names: Annotated[list[Text], Field(max_length=2)] = Field(default_factory=lambda: ["a"])
        none: Annotated[list[Text], Field(max_length=2)] = Field(default_factory=list)

    found = properties(Model)

    assert found["engine"]["default"] == {}
    assert found["names"]["default"] == ["a"]
    assert "default" not in found["none"]


def test_lists_are_atomic_maps_or_sets() -> None:
    class Model(ApiSpec):
        plain: Annotated[list[Text], Field(max_length=3)]
        by_name: Annotated[list[Named], ListMap(("name",)), Field(max_length=3)]
        marked: Annotated[list[Text], ListSet(), Field(max_length=3)]
        python_set: Annotated[frozenset[Text], Field(max_length=3)]

    found = properties(Model)

    assert found["plain"]["x-kubernetes-list-type"] == "atomic"
    assert found["byName"]["x-kubernetes-list-type"] == "map"
    assert found["byName"]["x-kubernetes-list-map-keys"] == ["name"]
    assert found["marked"]["x-kubernetes-list-type"] == found["pythonSet"]["x-kubernetes-list-type"] == "set"
    assert "uniqueItems" not in found["pythonSet"]


def test_mappings_and_values_of_any_form() -> None:
    class Model(ApiSpec):
        prices: Annotated[dict[str, float], Field(max_length=4)]
        template: Annotated[dict[str, Any], PreserveUnknown()]
        anything: Annotated[Any, PreserveUnknown()]
        amount: Annotated[int | str, IntOrString()]

    found = properties(Model)

    assert found["prices"] == {"type": "object", "maxProperties": 4, "additionalProperties": {"type": "number"}}
    assert found["template"] == {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    assert found["anything"] == {"x-kubernetes-preserve-unknown-fields": True}
    assert found["amount"] == {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
    }


def test_below_status_there_are_neither_defaults_nor_bounds() -> None:
    class Status(ApiStatus):
        phase: str = "Pending"
        steps: list[int] = Field(default_factory=lambda: [1])

    class Model(ApiSpec):
        status: Status = Status()

    assert properties(Model)["status"] == {
        "type": "object",
        "properties": {
            "phase": {"type": "string"},
            "steps": {"type": "array", "items": {"type": "integer"}, "x-kubernetes-list-type": "atomic"},
        },
    }


class Tree(ApiSpec):
    child: Tree | None = None


class OptionalKey(ApiSpec):
    name: Text = ""


class Recursive(ApiSpec):
    field: Tree


class Untyped(ApiSpec):
    field: Any


class AnyMapping(ApiSpec):
    field: dict[str, Any]


class Union(ApiSpec):
    field: int | bool


class Pair(ApiSpec):
    field: tuple[int, Text]


class Duration(ApiSpec):
    field: timedelta


class KeyPattern(ApiSpec):
    field: Annotated[dict[Annotated[str, Field(pattern="^a")], Text], Field(max_length=1)]


class UnboundedText(ApiSpec):
    field: str


class UnboundedList(ApiSpec):
    field: list[Text]


class UnboundedMapping(ApiSpec):
    field: dict[str, int]


class NoListKey(ApiSpec):
    field: Annotated[list[OptionalKey], ListMap(("name",)), Field(max_length=1)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recursive, r"\.field\.child: Tree contains itself; structural schemas must be finite"),
        (Untyped, r"\.field: a value of any type is pruned by the API server; name its type"),
        (AnyMapping, r"\.field: a mapping of anything is pruned by the API server; add PreserveUnknown\(\)"),
        (Union, r"\.field: a union of types cannot be expressed; IntOrString\(\)"),
        (Pair, r"\.field: JSON Schema keyword 'prefixItems' cannot be expressed; name the members"),
        (Duration, r"\.field: format 'duration' means something else to Kubernetes; use a pattern"),
        (KeyPattern, r"\.field: JSON Schema keyword 'patternProperties' cannot be expressed; use plain str keys"),
        (UnboundedText, r"\.field: the string has no bound; add Field\(max_length=...\)"),
        (UnboundedList, r"\.field: the list has no bound"),
        (UnboundedMapping, r"\.field: the mapping has no bound"),
        (NoListKey, r"\.field: list keys \['name'\] are optional; make them required"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_said_is_refused_with_path_and_remedy(model: type[ApiSpec], message: str) -> None:
    with pytest.raises(NotStructuralError, match=message):
        structural_schema(model)
