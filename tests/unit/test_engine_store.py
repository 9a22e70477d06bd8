"""The store: who is woken by what, and that older news never replaces newer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_operator.api.labels import MANAGED_BY, OWNER_KIND, OWNER_NAME, OWNER_UID
from rlhf_operator.engine.slim import slim
from rlhf_operator.engine.store import Store
from rlhf_operator.kinds.base import Key
from tests.property.toy import WIDGET

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
ADA, BOB = Key("Widget", "ns", "ada"), Key("Widget", "ns", "bob")


def obj(kind: str, name: str, version: int = 1, uid: str = "", **fields: Any) -> dict[str, Any]:
    meta = {"namespace": "ns", "name": name, "uid": uid or f"{kind}-{name}", "resourceVersion": str(version)}
    return {"kind": kind, "apiVersion": "v1", "metadata": {**meta, **fields.pop("metadata", {})}, **fields}


def child(kind: str, name: str, owner: str, version: int = 1, uid: str = "", **fields: Any) -> dict[str, Any]:
    owner_uid = uid or f"Widget-{owner}"
    labels = {OWNER_KIND: "Widget", OWNER_NAME: owner, OWNER_UID: owner_uid, MANAGED_BY: "rlhf-operator"}
    reference = {"kind": "Widget", "name": owner, "uid": owner_uid, "controller": True}
    return obj(kind, name, version, metadata={"labels": labels, "ownerReferences": [reference]}, **fields)


@pytest.fixture
def store() -> Store:
    made = Store((WIDGET,))
    made.put(obj("Widget", "ada"))
    return made


def test_children_wake_their_owner_and_are_listed_by_kind(store: Store) -> None:
    assert store.put(child("Job", "ada-a2", "ada")) == {ADA}
    assert store.put(child("Job", "ada-a1", "ada")) == {ADA}

    found = store.children(ADA)

    assert [job["metadata"]["name"] for job in found["Job"]] == ["ada-a1", "ada-a2"]
    assert found["ConfigMap"] == ()


def test_an_object_of_a_grandchild_is_found_by_its_labels(store: Store) -> None:
    pod = child("Job", "deep", "ada")
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "ada-a1", "uid": "other", "controller": True}]

    assert store.put(pod) == {ADA}
    assert len(store.children(ADA)["Job"]) == 1


def test_children_of_an_earlier_namesake_do_not_belong(store: Store) -> None:
    store.put(child("Job", "ada-a1", "ada", uid="an-earlier-ada"))

    assert store.children(ADA)["Job"] == ()


def test_what_changes_nothing_wakes_nobody(store: Store) -> None:
    again = obj("Widget", "ada", 7, metadata={"managedFields": [{"manager": "kubectl"}]})

    assert store.put(again) == frozenset()
    assert store.primary(ADA)["metadata"]["resourceVersion"] == "7"


def test_an_older_copy_does_not_replace_a_newer_one(store: Store) -> None:
    store.put(obj("Widget", "ada", 9, spec={"color": "new"}))

    assert store.put(obj("Widget", "ada", 8, spec={"color": "old"})) == frozenset()
    assert store.primary(ADA)["spec"] == {"color": "new"}


def test_what_was_deleted_does_not_come_back_by_a_late_answer(store: Store) -> None:
    store.put(child("Job", "ada-a1", "ada", 5))
    store.remove(child("Job", "ada-a1", "ada", 9))

    assert store.put(child("Job", "ada-a1", "ada", 8)) == frozenset()
    assert store.children(ADA)["Job"] == ()


def test_an_object_that_left_the_selector_may_come_back(store: Store) -> None:
    store.remove(child("Job", "ada-a1", "ada", 9))

    assert store.put(child("Job", "ada-a1", "ada", 9)) == {ADA}


def test_the_deletion_of_a_namesake_is_not_taken_for_its_successor(store: Store) -> None:
    successor = obj("Widget", "ada", 20, uid="second")
    assert ADA in store.put(successor)

    assert store.remove(obj("Widget", "ada", 15)) == frozenset()
    assert store.primary(ADA)["metadata"]["uid"] == "second"


def test_who_refers_to_an_object_is_woken_by_it_even_before_it_exists(store: Store) -> None:
    store.put(obj("Widget", "ada", 2, spec={"after": "bob"}))
    assert store.related(ADA) == {BOB: None}

    assert store.put(obj("Widget", "bob")) == {ADA, BOB}
    assert store.related(ADA)[BOB]["metadata"]["name"] == "bob"
    store.put(obj("Widget", "ada", 3, spec={}))
    assert store.put(obj("Widget", "bob", 2, spec={"color": "red"})) == {BOB}


def test_decisions_wake_their_subject_and_come_oldest_first(store: Store) -> None:
    for name, created in (("late", "2026-01-02T00:00:00Z"), ("early", "2026-01-01T00:00:00Z")):
        spec = {"subject": {"kind": "Widget", "name": "ada"}}
        assert store.put(obj("Decision", name, metadata={"creationTimestamp": created}, spec=spec)) == {ADA}

    assert [d["metadata"]["name"] for d in store.decisions(ADA)] == ["early", "late"]


@pytest.mark.parametrize("spec", [None, {}, {"subject": None}, {"subject": {"kind": "Widget"}}])
def test_a_malformed_decision_concerns_nobody(store: Store, spec: Any) -> None:
    assert store.put(obj("Decision", "odd", spec=spec)) == frozenset()


def test_a_kind_whose_references_fail_is_stored_all_the_same() -> None:
    def broken(_: Any) -> frozenset[Key]:
        raise KeyError("spec")

    store = Store((replace(WIDGET, references=broken),))

    assert store.put(obj("Widget", "ada")) == {ADA}


def test_slim_keeps_what_plans_read_and_drops_the_rest() -> None:
    pod = obj(
        "Pod",
        "p",
        metadata={
            "managedFields": [1],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "a": "b"},
        },
        spec={
            "nodeName": "n",
            "volumes": [1],
            "containers": [{"name": "c", "image": "i", "env": [1]}],
        },
        status={"phase": "Running"},
    )
    job = obj("Job", "j", spec={"completions": 2, "template": {"metadata": {"labels": {}}, "spec": {"containers": []}}})

    assert slim(pod)["spec"] == {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}
    assert slim(pod)["metadata"]["annotations"] == {"a": "b"}
    assert "managedFields" not in slim(pod)["metadata"]
    assert "managedFields" in pod["metadata"]
    assert slim(job)["spec"] == {"completions": 2, "template": {"metadata": {"labels": {}}}}
