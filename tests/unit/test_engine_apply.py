"""Whether a write is needed: desired is a subset of live, quantities, merge patches, adoption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_operator.engine.apply import adopt, is_subset, merge_patch, needs_apply, quantity, stamp
from tests.property.memory_api import merged

PRIMARY = {
    "apiVersion": "rlhf.dev/v1alpha1",
    "kind": "Widget",
    "metadata": {"namespace": "ns", "name": "ada", "uid": "u1"},
}
CHILD = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "c", "labels": {"mine": "x"}},
    "data": {"a": "1"},
}


@pytest.mark.parametrize(
    ("one", "other"),
    [("0.5", "500m"), (0.5, "500m"), (1, "1"), ("1Gi", "1024Mi"), ("1e3", "1k"), ("1E3", "1000"), ("+2", 2)],
)
def test_equal_quantities(one: Any, other: Any) -> None:
    assert quantity(one) == quantity(other)


@pytest.mark.parametrize("no", ["", "five", "1 Gi", "Gi", "1.2.3", None])
def test_what_is_no_quantity(no: Any) -> None:
    assert quantity(no) is None


@pytest.mark.parametrize(
    ("desired", "live", "expected"),
    [
        ({"a": 1}, {"a": 1, "defaulted": True}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {}, False),
        ({"a": None}, {}, True),
        ({"a": {}}, {}, True),
        ({"a": 0}, {}, False),
        ({"a": True}, {"a": 1}, False),
        ({"limits": {"cpu": 0.5}}, {"limits": {"cpu": "500m"}}, True),
        ({"limits": {"cpu": "1"}}, {"limits": {"cpu": "2"}}, False),
        ({"name": "0.5"}, {"name": "500m"}, False),
        ({"sizeLimit": "1024Mi"}, {"sizeLimit": "1Gi"}, True),
        ({"args": ["a", "b"]}, {"args": ["a", "b"]}, True),
        ({"args": ["a"]}, {"args": ["a", "b"]}, False),
        ({"args": ["b", "a"]}, {"args": ["a", "b"]}, False),
        ({"env": [{"name": "B", "value": "2"}]}, {"env": [{"name": "A"}, {"name": "B", "value": "2"}]}, True),
        ({"env": [{"name": "B", "value": "2"}]}, {"env": [{"name": "A"}]}, False),
        ({"rules": [{"verbs": ["get"]}]}, {"rules": [{"verbs": ["get"]}, {"verbs": ["list"]}]}, False),
        ({"policies": [{"type": "A", "v": 1}, {"type": "A", "v": 2}]}, {"policies": [{"type": "A", "v": 2}]}, False),
        ({"a": "x"}, {"a": {"x": 1}}, False),
    ],
)
def test_subset(desired: Any, live: Any, expected: bool) -> None:
    assert is_subset(desired, live) is expected


def test_a_field_no_longer_wanted_needs_an_apply_though_the_rest_is_there() -> None:
    before = stamp(adopt({**CHILD, "data": {"a": "1", "b": "2"}}, PRIMARY))
    after = stamp(adopt(CHILD, PRIMARY))

    assert not needs_apply(before, copy.deepcopy(before))
    assert needs_apply(after, before)
    assert needs_apply(after, None)


def test_adoption_labels_and_owns_and_leaves_the_plan_as_it_is() -> None:
    original = copy.deepcopy(CHILD)

    made = adopt(CHILD, PRIMARY)

    assert original == CHILD
    assert made["metadata"]["namespace"] == "ns"
    assert made["metadata"]["labels"] == {
        "mine": "x",
        "rlhf.dev/managed-by": "rlhf-operator",
        "rlhf.dev/kind": "Widget",
        "rlhf.dev/name": "ada",
        "rlhf.dev/uid": "u1",
    }
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == ("u1", True)


JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(-3, 3), st.sampled_from(["x", "y"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from("abcd"), JSON, max_size=4)


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_turns_live_into_desired_and_nothing_else(live: dict[str, Any], desired: dict[str, Any]) -> None:
    patch = merge_patch(live, desired)

    assert _canonical(merged(live, patch)) == _canonical(desired)
    assert (patch == {}) is (_canonical(live) == _canonical(desired))


@given(OBJECTS)
def test_everything_is_a_subset_of_itself(value: dict[str, Any]) -> None:
    assert is_subset(value, value)


def _canonical(value: Any) -> Any:
    """So that True and 1 differ."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return (type(value).__name__, value)
