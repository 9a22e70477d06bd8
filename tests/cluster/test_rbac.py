"""The chart's roles on a real API server: the operator, a gateway and users can do their work, and no more."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from typing import Any

import pytest
import yaml

from rlhf_gateway.wire import TOKEN_AUDIENCE
from rlhf_operator.kinds import KINDS
from tests.cluster.charts import Charts
from tests.cluster.rest import Rest
from tests.cluster.samples import CRDS, Body, example, text

SYSTEM = "rlhf-system"
OPERATOR = f"system:serviceaccount:{SYSTEM}:rlhf-operator"


@pytest.fixture(scope="module", autouse=True)
def installed(control_plane, kubectl) -> None:
    control_plane.install_crds(CRDS)
    kubectl("create", "namespace", SYSTEM)
    kubectl("apply", "-f", "-", input=Charts().render("rlhf-operator").text)


@pytest.fixture
def can(control_plane, tmp_path, namespace) -> Any:
    """can(user, verb, resource, where=namespace); resource as in Rest.allowed()."""
    rest = Rest(control_plane.kubeconfig, tmp_path)

    def answer(user: str, verb: str, resource: str, where: str = namespace) -> bool:
        return rest.allowed(user, verb, resource, where)

    return answer


def test_the_operator_may_do_its_work(can) -> None:
    for kind in KINDS:
        assert can(OPERATOR, "watch", f"{kind.plural}.rlhf.dev")
        assert can(OPERATOR, "patch", f"{kind.plural}/status.rlhf.dev")
        for child in kind.children:
            assert can(OPERATOR, "create", f"{child.plural}.{child.group}")
        for seen in kind.related:
            assert can(OPERATOR, "watch", f"{seen.plural}.{seen.group}")
    assert can(OPERATOR, "watch", "decisions.rlhf.dev")
    assert can(OPERATOR, "create", "events.events.k8s.io")
    assert can(OPERATOR, "update", "leases.coordination.k8s.io:rlhf-operator", where=SYSTEM)
    assert can(OPERATOR, "get", "validatingadmissionpolicies.admissionregistration.k8s.io:decisions.rlhf.dev")


def test_the_operator_may_not_do_more(can) -> None:
    for kind in KINDS:
        for verb in ("create", "update", "patch", "delete"):
            assert not can(OPERATOR, verb, f"{kind.plural}.rlhf.dev")
    for verb in ("create", "update", "patch", "delete"):
        assert not can(OPERATOR, verb, "persistentvolumeclaims")
    assert not can(OPERATOR, "create", "decisions.rlhf.dev")
    assert not can(OPERATOR, "get", "secrets")
    assert not can(OPERATOR, "create", "pods")
    assert not can(OPERATOR, "create", "pods/exec")
    assert not can(OPERATOR, "update", "leases.coordination.k8s.io:rlhf-operator")
    assert not can(OPERATOR, "update", "leases.coordination.k8s.io:another", where=SYSTEM)
    assert not can(OPERATOR, "update", "validatingadmissionpolicies.admissionregistration.k8s.io:decisions.rlhf.dev")


def test_a_named_watch_of_the_decision_policy_is_allowed(kubectl) -> None:
    """RBAC with resourceNames admits a list only where the field selector names the object."""
    words = ("get", "validatingadmissionpolicies", f"--as={OPERATOR}", "-o", "name")

    named = kubectl(*words, "--field-selector=metadata.name=decisions.rlhf.dev")
    assert named.stdout.split() == ["validatingadmissionpolicy.admissionregistration.k8s.io/decisions.rlhf.dev"]
    assert "forbidden" in kubectl(*words, check=False).stderr


def role(rules: list[Body]) -> Body:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "desk-gateway"},
        "rules": rules,
    }


def test_the_operator_grants_a_gateway_its_configmap_and_cannot_grant_what_it_has_not(kubectl, namespace) -> None:
    own = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["desk"], "verbs": ["get", "list", "watch"]}
    secrets = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}

    def create(body: Body) -> Any:
        words = ("-n", namespace, "create", f"--as={OPERATOR}", "--dry-run=server", "-f", "-")
        return kubectl(*words, input=text(body), check=False)

    assert create(role([own])).returncode == 0
    assert "attempting to grant RBAC permissions not currently held" in create(role([secrets])).stderr


def test_viewers_editors_and_decision_makers(kubectl, can, namespace) -> None:
    """There is no controller that aggregates here, so the roles are bound as they are."""
    for name in ("viewer", "editor", "decision-maker"):
        words = ("-n", namespace, "create", "rolebinding", name, f"--clusterrole=rlhf-operator-{name}")
        kubectl(*words, f"--user={name}")

    table = {  # (read jobs, write jobs, read decisions, decide, undo)
        "viewer": (True, False, True, False, False),
        "editor": (False, True, False, False, False),
        "decision-maker": (False, False, True, True, False),
    }
    for user, expected in table.items():
        found = (
            can(user, "list", "rewardmodeljobs.rlhf.dev"),
            can(user, "create", "policyrollouts.rlhf.dev"),
            can(user, "list", "decisions.rlhf.dev"),
            can(user, "create", "decisions.rlhf.dev"),
            can(user, "delete", "decisions.rlhf.dev"),
        )
        assert found == expected, user


def answer_to(control_plane: Any, path: str, token: str) -> int:
    """The HTTP status for a bearer token, which kubectl would send beside the administrator's certificate."""
    cluster = yaml.safe_load(control_plane.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    request = urllib.request.Request(control_plane.server + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cadata=authority)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def review(kubectl: Any, user: str, token: str, namespace: str) -> Body:
    """A TokenReview as a gateway of that namespace makes it."""
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [TOKEN_AUDIENCE]},
    }
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
    words = [
        "create",
        f"--as={user}",
        *(f"--as-group={group}" for group in groups),
        "--validate=false",
        "-o",
        "json",
        "-f",
        "-",
    ]
    found: Body = json.loads(kubectl(*words, input=text(body)).stdout)["status"]
    return found


def test_what_a_gateway_is_shown_proves_the_operator_and_opens_nothing_else(control_plane, kubectl, namespace) -> None:
    gateway = f"system:serviceaccount:{namespace}:desk-gateway"
    create = ("-n", SYSTEM, "create", "token", "rlhf-operator")
    shown = kubectl(*create, f"--audience={TOKEN_AUDIENCE}").stdout.strip()
    full = kubectl(*create).stdout.strip()

    accepted = review(kubectl, gateway, shown, namespace)
    assert accepted["authenticated"] is True
    assert accepted["user"]["username"] == OPERATOR
    assert accepted["audiences"] == [TOKEN_AUDIENCE]
    assert "authenticated" not in review(kubectl, gateway, full, namespace)

    path = "/api/v1/configmaps?limit=1"
    assert answer_to(control_plane, path, full) == 200
    assert answer_to(control_plane, path, shown) == 401


def test_an_editor_cannot_write_a_status(kubectl, namespace) -> None:
    kubectl("-n", namespace, "create", "rolebinding", "editor", "--clusterrole=rlhf-operator-editor", "--user=editor")
    kubectl("-n", namespace, "create", "-f", "-", "--as=editor", input=text(example("reward-model-job")))

    patch = ("patch", "rmj", "helpful-rm", "--subresource=status", "--type=merge", "-p", '{"status": {"attempt": 5}}')
    assert "forbidden" in kubectl("-n", namespace, *patch, "--as=editor", check=False).stderr
