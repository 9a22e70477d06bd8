"""A rollout on a real Kubernetes under continuous traffic: promoted, rolled back, or patiently waiting."""

from __future__ import annotations

import time

from tests.e2e.rollout_world import Rollout, eventually

# Small numbers of conversations need wide margins: the base policy leaks in about 4 % of its answers.
GUARDRAILS = [
    {"metric": "safetyViolationRate", "margin": 0.15, "alpha": 0.02},
    {"metric": "availability", "margin": 0.1, "alpha": 0.02},
    {"metric": "latencyP95", "margin": 0.4, "alpha": 0.01, "limit": "50ms"},
]
TRAINER_IMAGE = "docker.io/library/rlhf-trainer:dev"
STAGES = [
    {"weightPercent": 0, "shadow": True, "minSamples": 30},
    {"weightPercent": 20, "minSamples": 20},
    {"weightPercent": 50, "minSamples": 60},
]


def test_a_good_policy_is_promoted_without_a_failed_request(rollout: Rollout) -> None:
    first, second = rollout.policy("first"), rollout.policy("second")
    rollout.create(first, stages=STAGES, guardrails=GUARDRAILS)
    with rollout.users().asking() as users, rollout.watching("policyrollout", "desk") as versions:
        eventually("users are answered", lambda: len(users.answers) > 20)
        rollout.patch(policy=second)
        pods = eventually("the candidate runs", lambda: ready_pods(rollout, second), timeout=180)
        eventually("the promotion", lambda: rollout.entry(second["digest"])["state"] == "Stable", timeout=300)
        rollout.until("Healthy")
        after = len(users.answers)
        eventually("users are answered by the new policy", lambda: len(users.answers) > after + 30)
    phases = [body["status"]["phase"] for _, body in versions if "status" in body]
    assert list(dict.fromkeys(phases)) == ["Healthy", "Progressing", "Shadowing", "Promoting"]
    assert users.failures() == []
    assert {answer.revision for answer in users.answers[-10:]} == {name(rollout, second)}
    entry = rollout.entry(second["digest"])
    assert (entry["state"], entry["reason"]) == ("Stable", "Promoted")
    assert {verdict["state"] for verdict in entry["verdicts"]} == {"Pass"}
    assert all(verdict["interval"]["upper"] <= verdict["margin"] for verdict in entry["verdicts"])
    assert rollout.entry(first["digest"])["state"] == "Retained"
    assert ready_pods(rollout, second) == pods  # no model was loaded again


def test_a_leaking_policy_is_rolled_back_at_its_canary_stage_with_the_evidence(rollout: Rollout) -> None:
    first, leaky = rollout.policy("first"), rollout.policy("leaky", of="desk-leaky")
    stages = [{"weightPercent": 40, "minSamples": 5000}]
    tight = [{**GUARDRAILS[0], "margin": 0.03}]  # the leaky policy leaks in about 12 % more of its answers
    rollout.create(first, stages=stages, guardrails=tight, fallback={"onSafetyHit": "stable"})
    with rollout.users(rate=15).asking() as users:
        eventually("users are answered", lambda: len(users.answers) > 20)
        rollout.patch(policy=leaky)
        rollout.until("RolledBack", timeout=300)
        rolled_back = time.time()
        after = len(users.answers)
        eventually("users go on being answered", lambda: len(users.answers) > after + 40)
    assert users.failures() == []
    entry = rollout.entry(leaky["digest"])
    assert (entry["state"], entry["reason"]) == ("Rejected", "GuardrailCrossed")
    assert "safetyViolationRate in stage 0" in entry["message"]
    assert "conditional binomial e-process" in entry["message"]
    (verdict,) = entry["verdicts"]
    assert verdict["state"] == "Fail"
    assert verdict["eValue"] >= verdict["bound"] == 50
    assert verdict["n"] > 0
    assert verdict["candidateRate"] > verdict["stableRate"]
    assert not [answer for answer in users.by("canary") if answer.at > rolled_back + 1.0]
    assert any(answer.fallback == "safety" for answer in users.answers)
    assert rollout.weight() == 0.0
    assert not rollout.get("deployment", name(rollout, leaky))
    assert rollout.condition("Degraded")["reason"] == "DigestRejected"


def test_without_traffic_nothing_happens_and_the_status_says_how_many_are_missing(rollout: Rollout) -> None:
    first, second = rollout.policy("first"), rollout.policy("second")
    stages = [{"weightPercent": 10, "minSamples": 40}, {"weightPercent": 50, "minSamples": 60, "approval": "Required"}]
    rollout.create(first, stages=stages, guardrails=GUARDRAILS)
    rollout.patch(policy=second)
    eventually("samples are asked for", lambda: rollout.condition("Progressing").get("reason") == "NeedMoreSamples")
    eventually("the route is programmed", lambda: rollout.condition("RouteProgrammed").get("status") == "True")
    time.sleep(3)  # for whatever else might be written
    before = rollout.get("policyrollout", "desk")
    time.sleep(20)
    after = rollout.get("policyrollout", "desk")
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]  # not one write
    assert (after["status"]["phase"], after["status"]["stage"]) == ("Progressing", 0)
    message = rollout.condition("Progressing")["message"]
    assert "0 of 40 candidate conversations in stage 0: 40 more needed" in message
    assert {verdict["state"] for verdict in after["status"]["verdicts"]} == {"NeedMoreData"}
    assert all(verdict["needed"] > 0 for verdict in after["status"]["verdicts"])
    assert rollout.entry(second["digest"])["state"] == "Candidate"
    _people_decide(rollout, second["digest"])


def _people_decide(rollout: Rollout, digest: str) -> None:
    """A stage is skipped, the last one is not; then the candidate is taken out."""
    rollout.decide("enough", "SkipStage", digest=digest, stage=0)
    eventually("the next stage", lambda: rollout.status()["stage"] == 1)
    assert "stage 0 skipped: " in rollout.entry(digest)["approvals"][0]
    rollout.decide("enough-again", "SkipStage", digest=digest, stage=1)
    wanted = "a promotion needs every guardrail to pass"
    eventually("the guardrails are asked for", lambda: wanted in rollout.condition("Progressing")["message"])
    rollout.decide("out", "Abort", digest=digest)
    rollout.until("RolledBack")
    entry = rollout.entry(digest)
    assert (entry["state"], entry["reason"]) == ("Rejected", "AbortedByDecision")
    assert "looked into it" in entry["message"]


def test_a_server_of_ones_own_serves_what_was_pinned_and_nothing_else(rollout: Rollout) -> None:
    first, second = rollout.policy("first"), rollout.policy("second")
    own = {
        "engine": "custom",
        "image": TRAINER_IMAGE,
        "command": ["python", "-m", "rlhf_trainer.serve"],
        "args": ["--model", "$(RLHF_MODEL_PATH)", "--served-name", "$(RLHF_SERVED_NAME)"],  # it checks nothing
    }
    rollout.create(first, serving=own, stages=STAGES, guardrails=GUARDRAILS)
    with rollout.users().asking() as users:
        eventually("users are answered", lambda: len(users.answers) > 20)
        altered = {**second, "digest": "sha256:" + "3" * 64}
        rollout.patch(policy=altered)
        rollout.until("RolledBack")
        after = len(users.answers)
        eventually("users go on being answered", lambda: len(users.answers) > after + 20)
    entry = rollout.entry(altered["digest"])
    assert (entry["state"], entry["reason"]) == ("Rejected", "CandidateUnavailable")
    assert "exit code 11" in entry["message"]
    assert users.failures() == []
    assert {answer.revision for answer in users.answers} == {name(rollout, first)}


def name(rollout: Rollout, policy: dict[str, str]) -> str:
    """Of the Deployment, Service and pods of a policy."""
    return str(rollout.entry(policy["digest"])["revision"])


def ready_pods(rollout: Rollout, policy: dict[str, str]) -> set[str]:
    """The uids of a policy's pods, once all are ready; empty before."""
    if not rollout.entry(policy["digest"]):
        return set()
    pods = rollout.items("pods", f"rlhf.dev/revision={name(rollout, policy)}")
    ready = [c["status"] for pod in pods for c in pod["status"].get("conditions", []) if c["type"] == "Ready"]
    return {pod["metadata"]["uid"] for pod in pods} if ready and set(ready) == {"True"} else set()
