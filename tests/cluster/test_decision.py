"""A Decision is its author's: the API server binds spec.by to the requesting user, and RBAC says who may decide."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_operator.api.decision import admission_policy, admission_policy_binding, enforced
from rlhf_operator.kinds import rbac
from sandbox.processes import wait_until
from tests.cluster.samples import CRDS, Body, changed, example, text

DENIED = "spec.by must be the user who creates the decision: set it to "


@pytest.fixture(scope="module", autouse=True)
def policy(control_plane, kubectl) -> None:
    control_plane.install_crds(CRDS)
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "test-decision-maker"},
        "rules": rbac.decision_maker_rules(),
    }
    items = [role, admission_policy(), admission_policy_binding()]
    kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    forged = text(approval("not-me"))

    def is_bound() -> bool:
        """The apiserver takes a moment to compile a new policy."""
        return DENIED in kubectl("create", "--dry-run=server", "-f", "-", input=forged, check=False).stderr

    wait_until("the admission policy", is_bound, seconds=30)


@pytest.fixture
def decide(control_plane, kubectl, namespace) -> Any:
    """decide(user, body): as alice, carol (may decide) or bob (may not)."""
    for user in ("alice", "carol"):
        control_plane.user(user)
        words = ["create", "rolebinding", user, "--clusterrole=test-decision-maker", f"--user={user}"]
        kubectl("-n", namespace, *words)
    control_plane.user("bob")

    def run(user: str, *words: str, body: Body | None = None) -> Any:
        given = {} if body is None else {"input": text(body)}
        return kubectl("-n", namespace, *words, user=user, check=False, **given)

    return run


def approval(by: str) -> Body:
    return changed(example("decision-approve"), {"spec.by": by})


def test_who_may_decide_decides_in_their_own_name(decide) -> None:
    mine = decide("alice", "create", "-f", "-", body=approval("alice"))
    assert mine.returncode == 0, mine.stderr

    stored = json.loads(decide("alice", "get", "decision", "approve-desk-stage-3", "-o", "json").stdout)
    assert stored["spec"]["by"] == "alice"
    assert stored["metadata"]["creationTimestamp"]


@pytest.mark.parametrize(("user", "by"), [("alice", "carol"), ("carol", "alice"), ("alice", "Alice")])
def test_nobody_decides_in_the_name_of_another(decide, user: str, by: str) -> None:
    refused = decide(user, "create", "-f", "-", body=approval(by))

    assert DENIED + user in refused.stderr
    assert "NotFound" in decide(user, "get", "decision", "approve-desk-stage-3").stderr


def test_who_may_not_decide_is_refused_even_in_their_own_name(decide) -> None:
    refused = decide("bob", "create", "-f", "-", body=approval("bob"))

    assert 'User "bob" cannot create resource "decisions"' in refused.stderr


def test_an_administrator_is_bound_too(kubectl, namespace) -> None:
    refused = kubectl("-n", namespace, "create", "-f", "-", input=text(approval("alice")), check=False)

    assert DENIED + "admin" in refused.stderr


def test_what_is_decided_stays_decided(decide, kubectl, namespace) -> None:
    assert decide("alice", "create", "-f", "-", body=approval("alice")).returncode == 0
    name = "decision/approve-desk-stage-3"

    changed_by_admin = kubectl(
        "-n", namespace, "patch", name, "--type=merge", "-p", '{"spec": {"stage": 1}}', check=False
    )
    assert "a decision is immutable: create another one" in changed_by_admin.stderr
    for words in (["patch", name, "--type=merge", "-p", "{}"], ["delete", name]):
        assert "forbidden" in decide("alice", *words).stderr


def test_the_operator_recognises_the_live_policy_as_enforced(kubectl) -> None:
    """Reading them back brings the server's defaults, which must not look like a weakened policy."""
    live = [
        json.loads(kubectl("get", kind, "decisions.rlhf.dev", "-o", "json").stdout)
        for kind in ("validatingadmissionpolicy", "validatingadmissionpolicybinding")
    ]

    assert enforced(*live)
    live[1]["spec"]["validationActions"] = ["Audit"]
    assert not enforced(*live)


def test_decisions_read_well(decide) -> None:
    decide("alice", "create", "-f", "-", body=approval("alice"))

    short = decide("alice", "get", "decisions").stdout.splitlines()
    wide = decide("alice", "get", "dec", "-o", "wide").stdout.splitlines()

    assert short[0].split() == ["NAME", "ACTION", "KIND", "SUBJECT", "BY", "AGE"]
    assert short[1].split()[:5] == ["approve-desk-stage-3", "Approve", "PolicyRollout", "desk", "alice"]
    assert "Read fifty transcripts of the canary" in wide[1]
