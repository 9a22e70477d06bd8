"""What goes wrong while a candidate is on trial: its pods, the gateway, the operator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_gateway.wire import CONFIG_KEY
from sandbox.cluster import Cluster
from tests.e2e.conftest import OPERATOR_NAMESPACE
from tests.e2e.rollout_world import Rollout, eventually

WIDE = [{"metric": "availability", "margin": 0.3, "alpha": 0.001}]
ENDLESS = [{"weightPercent": 30, "minSamples": 100_000}]


def on_trial(rollout: Rollout, **spec: Any) -> dict[str, str]:
    """A second policy as the canary of a first; returns the second."""
    rollout.create(rollout.policy("first"), **{"stages": ENDLESS, "guardrails": WIDE, **spec})
    second = rollout.policy("second")
    rollout.patch(policy=second)
    eventually("the canary has its weight", lambda: rollout.weight() > 0.0, timeout=180)
    eventually("the route is programmed", lambda: rollout.condition("RouteProgrammed").get("status") == "True")
    return second


def revision(rollout: Rollout, policy: dict[str, str]) -> str:
    return str(rollout.entry(policy["digest"])["revision"])


def ready_endpoints(slice_: dict[str, Any]) -> int:
    return sum(bool((e.get("conditions") or {}).get("ready")) for e in slice_.get("endpoints") or ())


def weight(config_map: dict[str, Any]) -> float:
    return float(json.loads(config_map["data"][CONFIG_KEY])["canaryWeightPercent"])


def test_a_crash_looping_candidate_is_at_weight_zero_within_two_seconds_of_its_endpoint_loss(rollout: Rollout) -> None:
    second = on_trial(rollout)
    candidate = revision(rollout, second)
    with (
        rollout.users(rate=10).asking() as users,
        rollout.watching("endpointslices", "-l", f"kubernetes.io/service-name={candidate}") as slices,
        rollout.watching("configmap", "desk-gateway") as configs,
    ):
        eventually("the canary answers", lambda: users.by("canary"))
        (rollout.folder / "second" / "NOTE").write_text("another content: the next pod refuses to serve this")
        rollout.kubectl("delete", "pod", "-l", f"rlhf.dev/revision={candidate}", "--grace-period=0", "--force")
        status = rollout.until("RolledBack", timeout=240)
    lost = next(at for at, body in slices if ready_endpoints(body) == 0)
    zero = next(at for at, body in configs if at > lost - 1.0 and weight(body) == 0.0)
    assert zero - lost < 2.0
    entry = next(e for e in status["revisions"] if e["digest"] == second["digest"])
    assert (entry["state"], entry["reason"]) == ("Rejected", "CandidateUnavailable")
    assert "keeps crashing" in entry["message"]
    assert users.failures() == []  # the gateway answers from stable while the weight moves
    assert not [answer for answer in users.by("canary") if answer.at > zero + 3.0]


def test_a_gateway_restarted_in_mid_stage_loses_no_count_and_no_request(rollout: Rollout) -> None:
    second = on_trial(rollout)
    candidate = revision(rollout, second)
    samples: list[int] = []
    with rollout.users(rate=8).asking() as users:
        eventually("samples are counted", lambda: rollout.status().get("stageSamples", 0) > 20)
        rollout.kubectl("rollout", "restart", "deployment/desk-gateway")
        deadline = time.monotonic() + 45
        while time.monotonic() < deadline:
            samples.append(rollout.status().get("stageSamples", 0))
            time.sleep(1)
    assert users.failures() == []
    assert samples == sorted(samples)
    asked = sum(answer.revision == candidate for answer in users.answers)
    eventually(
        "every canary conversation is counted once", lambda: rollout.status()["stageSamples"] == asked, timeout=60
    )
    assert rollout.entry(second["digest"])["state"] == "Candidate"
    assert rollout.condition("MetricsAvailable")["status"] == "True"


@contextmanager
def forbidden(rollout: Rollout, resource: str, verb: str) -> Iterator[None]:
    """Takes one right from the operator, so that it stops between two writes; gives it back."""
    cluster = rollout.cluster
    role = json.loads(cluster.kubectl("get", "clusterrole", "rlhf-operator", "-o", "json"))
    role["metadata"] = {"name": "rlhf-operator", "labels": role["metadata"].get("labels", {})}
    changed = json.loads(json.dumps(role))
    for rule in list(changed["rules"]):
        if resource in rule["resources"] and verb in rule["verbs"]:
            rule["resources"].remove(resource)
            kept = [v for v in rule["verbs"] if v != verb]
            changed["rules"].append({**rule, "resources": [resource], "verbs": kept})
    changed["rules"] = [rule for rule in changed["rules"] if rule["resources"] and rule["verbs"]]
    cluster.kubectl("replace", "-f", "-", input=json.dumps(changed))
    try:
        yield
    finally:
        cluster.kubectl("replace", "-f", "-", input=json.dumps(role))


def kill_operator(cluster: Cluster) -> None:
    """At once, without its graceful end; the next process starts from what is there."""
    chosen = ("-n", OPERATOR_NAMESPACE, "delete", "pod", "-l", "app.kubernetes.io/name=rlhf-operator")
    cluster.kubectl(*chosen, "--grace-period=0", "--force")
    cluster.kubectl("-n", OPERATOR_NAMESPACE, "rollout", "status", "deployment/rlhf-operator", "--timeout=120s")


def test_an_operator_killed_between_record_and_route_finishes_the_rollback(rollout: Rollout) -> None:
    """A spec that goes back is recorded in status first; the route follows from the record in the next process."""
    second = on_trial(rollout)
    first = rollout.policy("first")
    with rollout.users(rate=8).asking() as users:
        with forbidden(rollout, "configmaps", "patch"):
            rollout.patch(policy=first)
            eventually("the record", lambda: rollout.entry(second["digest"]).get("state") == "Superseded")
            assert rollout.weight() == 30.0  # recorded, and not routed
            kill_operator(rollout.cluster)
            assert rollout.weight() == 30.0
        eventually("the route follows", lambda: rollout.weight() == 0.0, timeout=120)
        rollout.until("Healthy")
    assert users.failures() == []
    assert not rollout.get("deployment", revision(rollout, second))


def test_an_operator_killed_between_route_and_record_notes_the_endpoint_loss(rollout: Rollout) -> None:
    """After an endpoint loss the route is written first: it will be seen again by the next process."""
    second = on_trial(rollout)
    candidate = revision(rollout, second)
    with rollout.users(rate=8).asking() as users:
        with forbidden(rollout, "policyrollouts/status", "patch"):
            rollout.kubectl("scale", "deployment", candidate, "--replicas=0")
            eventually("the route", lambda: rollout.weight() == 0.0, timeout=30)
            assert rollout.condition("Progressing")["reason"] != "CandidateUnavailable"  # routed, and not recorded
            kill_operator(rollout.cluster)
        eventually("the candidate is back at its weight", lambda: rollout.weight() == 30.0, timeout=120)
        eventually("and the status agrees", lambda: rollout.status()["weights"]["written"] == 30.0)
    assert users.failures() == []
    assert rollout.entry(second["digest"])["state"] == "Candidate"
