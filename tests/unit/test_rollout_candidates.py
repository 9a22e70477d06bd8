"""The plan of a PolicyRollout as candidates come and go, and what people decide about them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from rlhf_operator.api.meta import ClaimSource
from rlhf_operator.api.policy_rollout_status import PolicyRolloutStatus, RevisionState
from rlhf_operator.kinds.base import Key
from rlhf_operator.kinds.policy_rollout import ledger
from tests.unit.rollout_world import (
    A_NAME,
    B_NAME,
    SAFETY_ONLY,
    STAGES,
    START,
    A,
    B,
    C,
    World,
    names,
    source,
    trying,
)


def test_a_newer_candidate_replaces_the_one_under_test_with_fresh_evidence() -> None:
    world = trying()
    world.run(2)
    assert world.status["stageSamples"] > 0
    world.spec(policy=source(C))
    world.settle()
    assert (world.entry(B)["state"], world.entry(C)["state"]) == ("Superseded", "Candidate")
    assert (world.status["stage"], world.status["stageSamples"], world.status["trial"]) == (0, 0, 2)
    assert B_NAME not in names(world, "Deployment")
    world.until("Healthy")
    assert world.entry(C)["state"] == "Stable"


def test_a_spec_that_is_reverted_in_mid_ramp_takes_the_candidate_out() -> None:
    world = trying()
    world.until("Progressing")
    world.spec(policy=source(A))
    world.settle()
    assert (world.status["phase"], world.config.canary) == ("Healthy", None)
    assert world.entry(B)["state"] == "Superseded"


def test_an_old_trial_of_the_same_digest_lends_no_evidence() -> None:
    world = trying()
    world.run(2)
    world.spec(policy=source(A))
    world.settle()
    world.now += timedelta(seconds=2)
    world.spec(policy=source(B))
    world.settle()
    assert (world.status["stageSamples"], world.status["trial"]) == (0, 2)


def test_changed_stages_or_guardrails_start_the_trial_again() -> None:
    world = trying()
    world.run(2)
    world.spec(guardrails=SAFETY_ONLY)
    world.settle()
    assert (world.status["trial"], world.status["stageSamples"]) == (2, 0)
    assert world.entry(B)["state"] == "Candidate"


def test_they_do_so_too_while_the_policy_of_the_spec_is_waited_for() -> None:
    world = trying(stages=STAGES[1:])
    while world.status["stage"] != 1:
        world.run(1)
    world.spec(policy={"jobRef": {"name": "next"}}, stages=STAGES[2:])  # one stage: index 1 is beyond its end
    world.settle()
    assert (world.status["trial"], world.status["stage"], world.status["stageSamples"]) == (2, 0, 0)
    assert (world.entry(A)["state"], world.entry(B)["state"]) == ("Stable", "Candidate")


def test_the_ledger_is_bounded_however_long_former_stables_are_retained() -> None:
    revisions: ledger.Revisions = ()
    for number in range(25):
        policy = ClaimSource(**source(f"sha256:{number:02x}" + "0" * 62))
        revisions = ledger.started(revisions, "desk", policy, RevisionState.CANDIDATE, "image", number, START)
        candidate = ledger.candidate(revisions)
        assert candidate is not None
        revisions = ledger.promoted(revisions, candidate, timedelta(days=400), START + timedelta(hours=number))
        PolicyRolloutStatus(revisions=list(revisions))  # which the API server refuses with one more
    assert [entry.trial for entry in revisions] == list(range(5, 25))
    assert {entry.state for entry in revisions[:-1]} == {RevisionState.RETAINED}


def served_from(world: World, name: str) -> str:
    volumes = world.children["Deployment", name]["spec"]["template"]["spec"]["volumes"]
    return str(next(v["persistentVolumeClaim"]["claimName"] for v in volumes if v["name"] == "model"))


def test_the_place_of_a_first_revision_that_cannot_start_is_corrected() -> None:
    world = World(policy={"uri": "pvc://mistyped/a", "digest": A})
    world.crashing = {A_NAME}
    world.settle()
    assert world.status["phase"] == "Failed"
    world.spec(policy=source(A))
    world.crashing = set()
    world.settle()
    assert (served_from(world, A_NAME), world.entry(A)["uri"]) == ("models", source(A)["uri"])
    assert (world.status["phase"], len(world.status["revisions"])) == ("Healthy", 1)


def test_a_policy_that_moves_is_followed_without_a_trial() -> None:
    world = trying()
    world.run(1)
    moved = {"uri": "pvc://archive/b", "digest": B}
    world.spec(policy=moved)
    world.settle()
    assert (served_from(world, B_NAME), world.status["trial"]) == ("archive", 1)
    world.until("Healthy")
    world.spec(policy={**moved, "uri": "pvc://models/b"})
    world.settle()
    assert (served_from(world, B_NAME), world.status["trial"], world.status["phase"]) == ("models", 1, "Healthy")


def test_an_upstream_job_hands_its_policy_over_when_it_is_complete() -> None:
    world = World(policy={"jobRef": {"name": "tuned"}})
    world.settle()
    assert (world.status["phase"], world.condition("Progressing")["reason"]) == ("Pending", "WaitingForUpstream")
    assert "does not exist" in world.condition("Progressing")["message"]
    job = {"metadata": {"name": "tuned"}, "status": {"phase": "Running", "artifact": source(B)}}
    key = Key("PolicyOptimizationJob", "team", "tuned")
    world.related[key] = job
    world.settle()
    assert "it is Running" in world.condition("Progressing")["message"]
    job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
    world.settle()
    assert (world.status["phase"], world.entry(B)["state"]) == ("Healthy", "Stable")


def approval_world() -> World:
    stages = [{"weightPercent": 50, "minSamples": 50, "approval": "Required"}, STAGES[2]]
    world = trying(stages=stages, guardrails=SAFETY_ONLY)
    world.until("AwaitingApproval")
    return world


def test_a_stage_waits_for_its_approval_and_the_ledger_names_who_gave_it() -> None:
    world = approval_world()
    assert world.condition("Approved")["status"] == "False"
    assert B in world.condition("Progressing")["message"]
    world.run(60)
    assert world.status["stage"] == 0
    world.decide("Approve", B, stage=0, by="grace")
    world.settle()
    assert world.status["stage"] == 1
    assert world.entry(B)["approvals"] == ["stage 0: grace (d0): looked at it"]


@pytest.mark.parametrize(
    ("digest", "stage", "more"),
    [(C, 0, {}), (B, 1, {}), (B, 0, {"expiresAt": "2026-11-23T12:00:01Z"})],
    ids=["another digest", "another stage", "expired"],
)
def test_an_approval_of_something_else_does_not_count(digest: str, stage: int, more: dict[str, str]) -> None:
    world = approval_world()
    world.decide("Approve", digest, stage=stage, **more)
    world.settle()
    assert world.status["phase"] == "AwaitingApproval"


def test_an_approval_is_not_reused_for_a_later_trial() -> None:
    world = approval_world()
    world.decide("Approve", B, stage=0)
    world.settle()
    world.now += timedelta(seconds=2)
    world.decide("Abort", B)
    world.settle()
    world.now += timedelta(seconds=2)
    world.decide("ClearRejection", B)
    world.settle()
    world.until("AwaitingApproval")
    world.run(5)
    assert world.status["phase"] == "AwaitingApproval"


def test_a_skipped_stage_ends_without_its_samples_duration_and_approval() -> None:
    long = {"weightPercent": 1, "minSamples": 100_000, "minDuration": "24h", "approval": "Required"}
    world = trying(stages=[long, STAGES[2]], guardrails=SAFETY_ONLY)
    world.run(5)
    world.decide("SkipStage", B, stage=1)
    world.settle()
    assert world.status["stage"] == 0  # another stage
    world.decide("SkipStage", B, stage=0, by="grace")
    world.settle()
    assert world.status["stage"] == 1
    assert world.entry(B)["approvals"] == ["stage 0 skipped: grace (d1): looked at it"]


def test_no_guardrail_is_outvoted_by_a_skipped_stage() -> None:
    world = trying(stages=[STAGES[2]], guardrails=SAFETY_ONLY)
    world.run(1)
    world.decide("SkipStage", B, stage=0)
    world.settle()
    assert (world.status["phase"], world.status["stage"]) == ("Progressing", 0)
    assert "a promotion needs every guardrail to pass" in world.condition("Progressing")["message"]
    world.until("Healthy")
    assert world.entry(B)["state"] == "Stable"


def test_a_shadow_that_looks_worse_is_not_skipped() -> None:
    world = trying(seed=3, guardrails=[{**SAFETY_ONLY[0], "margin": 0.1}])
    world.run(6, canary_bad=0.12, stable_bad=0.05)
    world.decide("SkipStage", B, stage=0)
    world.settle()
    assert world.status["stage"] == 0
    assert "looks worse in its shadow stage" in world.condition("Progressing")["message"]


def test_decisions_that_are_not_honoured_do_nothing_and_the_message_says_so() -> None:
    world = approval_world()
    world.honoured = False
    world.decide("Approve", B, stage=0)
    world.settle()
    assert world.status["phase"] == "AwaitingApproval"
    assert "not honoured" in world.condition("Progressing")["message"]


def test_paused_holds_the_weight_and_still_rolls_back() -> None:
    world = trying(stages=STAGES[1:])
    world.run(1)
    world.spec(paused=True)
    world.run(60)
    assert (world.status["phase"], world.status["stage"], world.config.canary_weight_percent) == ("Paused", 0, 10.0)
    world.run(20, canary_bad=0.5)
    assert world.entry(B)["state"] == "Rejected"


def test_resumed_goes_on_where_it_was() -> None:
    world = trying(stages=STAGES[1:])
    world.spec(paused=True)
    world.run(60)
    world.spec(paused=False)
    world.settle()
    assert world.status["stage"] == 1
    world.until("Healthy")
