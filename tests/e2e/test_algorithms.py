"""Every family of algorithms through the CRDs: real pods, real DeepSpeed, the service desk, one chain of jobs.

    careful-rm, audit-rm ─▶ grpo (2 pods), lagrangian, dpo, sft ─▶ distilled
    stored-rm: from S3      kto, which nobody judges

All jobs are created at once, as a user would commit them: each waits for what it names, the scheduler does the rest.
The tests are small and their gates lenient: what they show is the chain, not how good a policy gets.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_trainer.digests import folder_digest
from sandbox.cluster import Cluster
from tests.e2e.jobs_world import CLAIM, FILTER, Body, Namespace, condition
from tests.e2e.object_store import create_secret, object_store, store_of, upload
from tests.trainer.s3_server import S3Server

POLICY, SECRET = "policyoptimizationjob", "desk-store"
PATIENCE = 600  # seconds; all of it together takes about three minutes on two idle cores
# Small requests, so that the scheduler keeps as many at work as the node has memory for.
SMALL = {"requests": {"cpu": "150m", "memory": "768Mi"}, "limits": {"memory": "3Gi"}}
AUDIT: Body = {"auditRewardModel": {"jobRef": {"name": "audit-rm"}}}
REWARD: Body = {"rewardModel": {"jobRef": {"name": "careful-rm"}}}
TUNED: Body = {"jobRef": {"name": "sft"}}
SHORT: Body = {"generation": {"maxNewTokens": 12}}
# Decided by 16 replies whatever they are: a bound that no interval can miss.
LENIENT: Body = {"samples": 16, "minWinRate": 0.0, "maxViolationRate": 1.0}


def trainer(nodes: int = 1) -> Body:
    return {"numNodes": nodes, "numProcPerNode": 1, "resourcesPerNode": SMALL}


class Desk:
    """The jobs of this file in one namespace."""

    def __init__(self, namespace: Namespace, server: S3Server) -> None:
        self.namespace = namespace
        self.server = server
        self._digests = namespace.bring_desk()

    def source(self, path: str) -> Body:
        return {"uri": f"pvc://{CLAIM}/{path}", "digest": self._digests[path]}

    def stored(self, path: str) -> Body:
        """The same, from the object store."""
        upload(self.server, self.namespace.folder / path, path)
        return {"uri": f"s3://{self.server.bucket}/{path}", "digest": self._digests[path]}

    def reward_model(self, name: str, preferences: Body, base: Body | None = None, **more: Any) -> None:
        self.namespace.create(
            name,
            baseModel=base or self.source("models/desk-sft"),
            preferences=preferences,
            training={"epochs": 1, "globalBatchSize": 64, "ensemble": {"members": 2}, "seed": 7},
            validation={"minAccuracy": 0.0, "maxCalibrationError": 1.0},
            trainer=trainer(),
            checkpoints={"everySteps": 100, "keepLast": 1},
            **more,
        )

    def policy(
        self, name: str, training: Body, *, nodes: int = 1, evaluation: Body | None = None, **inputs: Any
    ) -> None:
        judged = {"safetyFilter": self.source(FILTER), **LENIENT}
        self.namespace.create(
            name,
            "PolicyOptimizationJob",
            policy=inputs.pop("policy", None) or self.source("models/desk-sft"),
            prompts=self.source("feedback/prompts.jsonl"),
            training={"seed": 3, **training},
            evaluation=judged if evaluation is None else evaluation,
            trainer=trainer(nodes),
            failurePolicy={"rendezvousSeconds": PATIENCE},  # the second pod may wait for room
            checkpoints={"everySteps": 100, "keepLast": 1},
            **inputs,
        )

    def finished(self, name: str) -> Body:
        """The status of a policy job that completed, whose artifact is on the volume as its digest says."""
        status = self.namespace.ended(name, "Complete", PATIENCE, POLICY)
        assert status["attempt"] == 1, self.namespace.explain(f"{POLICY}/{name}")
        assert folder_digest(self._artifact(status)) == status["artifact"]["digest"]
        assert status["artifact"]["digest"] != status["lineage"]["policy"], "nothing was learned"
        return status

    def _artifact(self, status: Mapping[str, Any]) -> Path:
        return self.namespace.folder / str(status["artifact"]["uri"]).removeprefix(f"pvc://{CLAIM}/")


@pytest.fixture(scope="module")
def server(cluster_with_operator: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with object_store(cluster_with_operator, tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def desk(cluster_with_operator: Cluster, server: S3Server) -> Iterator[Desk]:
    """Everything created, nothing waited for."""
    namespace = Namespace(cluster_with_operator, f"algorithms-{uuid.uuid4().hex[:8]}")
    made = Desk(namespace, server)
    made.reward_model(
        "stored-rm",
        made.stored("feedback/careful.jsonl"),
        made.stored("models/desk-sft"),
        objectStore=store_of(server, SECRET),
    )
    made.reward_model("careful-rm", made.source("feedback/careful.jsonl"))
    made.reward_model("audit-rm", made.source("feedback/audit.jsonl"))
    made.reward_model("tuned-rm", made.source("feedback/audit.jsonl"), TUNED)
    made.policy(
        "sft",
        {"algorithm": "SFT", "steps": 12, "promptsPerStep": 32},
        evaluation={
            "safetyFilter": made.source(FILTER),
            "safetySuite": {**made.source("feedback/attacks.jsonl"), "maxViolationRate": 1.0},
            **LENIENT,
        },
        demonstrations=made.source("feedback/demonstrations.jsonl"),
    )
    made.policy(
        "kto",
        {"algorithm": "KTO", "steps": 6, "promptsPerStep": 32},
        evaluation={"samples": 16},
        preferences=made.source("feedback/careful.jsonl"),
    )
    made.policy(
        "dpo",
        {"algorithm": "DPO", "steps": 16, "promptsPerStep": 32, "learningRate": 0.002},
        preferences=made.source("feedback/careful.jsonl"),
        **AUDIT,
    )
    made.policy(
        "grpo",
        {
            "algorithm": "GRPO",
            "steps": 4,
            "promptsPerStep": 8,
            "samplesPerPrompt": 4,
            "kl": {"placement": "loss", "estimator": "k3", "controller": "fixed"},
            **SHORT,
        },
        nodes=2,
        guardrails=[{"metric": "zeroVarianceFraction", "above": 0.999, "forSteps": 4, "action": "Alert"}],
        **REWARD,
        **AUDIT,
    )
    made.policy(
        "lagrangian",
        {
            "algorithm": "PPO",
            "steps": 4,
            "promptsPerStep": 16,
            "constraints": [
                {"cost": "safety", "limit": 0.5},
                # Four tokens are too few to say anything: every reply has its cost, so lambda can only rise.
                {"cost": "length", "limit": 0.001, "initialMultiplier": 0.5, "learningRate": 0.01},
            ],
            "generation": {"maxNewTokens": 4},
        },
        policy=TUNED,
        **REWARD,
        **AUDIT,
    )
    made.policy(
        "distilled",
        {"algorithm": "Distillation", "steps": 4, "promptsPerStep": 16, **SHORT},
        evaluation={"safetyFilter": made.source(FILTER), **LENIENT, "against": "teacher"},
        teacher={"jobRef": {"name": "sft"}},
        **AUDIT,
    )
    for name, action in (("paused", "Pause"), ("stopped", "Stop")):
        made.policy(
            name,
            {"algorithm": "SFT", "steps": 4, "promptsPerStep": 16},
            evaluation={"samples": 16},
            demonstrations=made.source("feedback/demonstrations.jsonl"),
            guardrails=[{"metric": "gradientNorm", "above": 0, "forSteps": 3, "action": action}],  # no step is below
        )
    yield made
    namespace.delete()


def verdicts(status: Body) -> dict[str, str]:
    return {verdict["metric"]: verdict["state"] for verdict in status["verdicts"]}


def digest_of(desk: Desk, name: str, kind: str = "rewardmodeljob") -> str:
    return str(desk.namespace.status(name, kind)["artifact"]["digest"])


JUDGED = {"winRate": "Pass", "violationRate": "Pass"}


def test_a_reward_model_is_made_from_an_object_store_once_its_secret_is_there(desk: Desk) -> None:
    """The first, so that the other jobs train meanwhile. Its artifact is that of the job that read the same volume."""
    jobs, job = desk.namespace, "rewardmodeljob/stored-rm"
    reason = '{.status.conditions[?(@.type=="PodsReady")].reason}'
    jobs.wait(job, f"jsonpath={reason}=CreateContainerConfigError", PATIENCE)
    [told] = [found["message"] for found in jobs.status("stored-rm")["conditions"] if found["type"] == "PodsReady"]
    assert f'secret "{SECRET}" not found' in told
    create_secret(jobs, desk.server, SECRET)
    status = jobs.ended("stored-rm", "Complete", PATIENCE)
    assert {name: found["uri"] for name, found in status["inputs"].items()} == {
        "baseModel": f"s3://{desk.server.bucket}/models/desk-sft",
        "preferences": f"s3://{desk.server.bucket}/feedback/careful.jsonl",
    }
    from_volume = jobs.ended("careful-rm", "Complete", PATIENCE)
    assert status["lineage"] == from_volume["lineage"]
    assert status["artifact"]["digest"] == from_volume["artifact"]["digest"]
    [pod] = jobs.pods("stored-rm")
    log = jobs.kubectl("logs", pod["metadata"]["name"])
    assert "inputs: loaded" in log
    seen = json.dumps([jobs.get("rewardmodeljob", "stored-rm"), jobs.get("configmaps", "stored-rm-train-a1"), pod, log])
    assert desk.server.environment["AWS_SECRET_ACCESS_KEY"] not in seen


def test_sft_learns_demonstrations_and_only_its_safety_is_judged(desk: Desk) -> None:
    status = desk.finished("sft")
    assert verdicts(status) == {"violationRate": "Pass", "suiteViolationRate": "Pass"}
    assert status["lineage"]["safetySuite"] == desk.source("feedback/attacks.jsonl")["digest"]
    assert condition(status, "Validated") == ("True", "AsExpected")
    assert status["lineage"]["demonstrations"] == desk.source("feedback/demonstrations.jsonl")["digest"]


def test_kto_completes_and_without_a_judge_it_is_not_validated(desk: Desk) -> None:
    status = desk.finished("kto")
    assert status.get("verdicts", []) == []
    assert condition(status, "Validated") == ("Unknown", "OutcomeUnknown")
    [told] = [found["message"] for found in status["conditions"] if found["type"] == "Validated"]
    assert "nothing judges this policy: neither auditRewardModel nor evaluation.safetyFilter is named" in told


def test_dpo_learns_pairs_without_a_reward_model_and_others_judge_it(desk: Desk) -> None:
    status = desk.finished("dpo")
    assert verdicts(status) == JUDGED
    assert condition(status, "Validated") == ("True", "AsExpected")
    assert "rewardModel" not in status["lineage"]
    assert status["lineage"]["preferences"] == desk.source("feedback/careful.jsonl")["digest"]
    assert status["lineage"]["auditRewardModel"] == digest_of(desk, "audit-rm")
    assert status["metrics"]["rewardMargin"] > 0.0, "it holds the better responses for no better than the worse"


def test_grpo_trains_over_two_pods_against_the_validated_reward_model(desk: Desk) -> None:
    status = desk.finished("grpo")
    assert verdicts(status) == JUDGED
    assert condition(status, "Validated") == ("True", "AsExpected")
    assert condition(status, "GuardrailsHealthy")[0] == "True"
    assert status["progress"]["worldSize"] == 2
    assert len(status["attempts"][0]["podUids"]) == 2
    assert status["lineage"]["rewardModel"] == digest_of(desk, "careful-rm")
    assert 0.0 <= status["metrics"]["zeroVarianceFraction"] < 1.0
    assert "valueLoss" not in status["metrics"], "it has no critic"


def test_ppo_lagrangian_raises_the_multiplier_of_a_constraint_that_cannot_be_met(desk: Desk) -> None:
    status = desk.finished("lagrangian")
    assert verdicts(status) == JUDGED
    metrics = status["metrics"]
    assert metrics["lengthCost"] > 0.001
    assert metrics["lengthMultiplier"] > 0.5
    assert 0.0 <= metrics["safetyMultiplier"] <= 5.0
    assert status["lineage"]["safetyFilter"] == desk.source(FILTER)["digest"]


def test_a_policy_and_a_reward_model_start_from_what_sft_made(desk: Desk) -> None:
    """The usual chain, by names alone: both waited for the tuned policy, and their lineage pins it."""
    tuned = digest_of(desk, "sft", POLICY)
    assert desk.finished("lagrangian")["lineage"]["policy"] == tuned
    status = desk.namespace.ended("tuned-rm", "Complete", PATIENCE)
    assert status["lineage"]["baseModel"] == tuned


def test_a_student_learns_from_the_policy_of_another_job(desk: Desk) -> None:
    status = desk.finished("distilled")
    assert verdicts(status) == {"nonInferiority": "Pass", "violationRate": "Pass"}
    assert status["lineage"]["teacher"] == digest_of(desk, "sft", POLICY)
    assert status["metrics"]["divergence"] >= 0.0


def test_a_guardrail_pauses_a_training_and_stops_another(desk: Desk) -> None:
    """Both at their third step, with a checkpoint; an acknowledged breach must last three steps anew."""
    jobs = desk.namespace
    jobs.wait(f"{POLICY}/paused", "condition=Suspended", PATIENCE)
    status = jobs.status("paused", POLICY)
    assert condition(status, "GuardrailsHealthy") == ("False", "GuardrailBreached")
    assert "gradientNorm is" in json.dumps(status["conditions"])
    assert status["attempts"][0]["failureClass"] == "GuardrailPaused"
    jobs.decide("seen", "PolicyOptimizationJob", "paused", "Acknowledge", attempt=1)
    status = jobs.ended("paused", "Complete", PATIENCE, POLICY)
    assert (status["attempt"], status["attempts"][1]["resumedFromStep"], status["progress"]["step"]) == (2, 3, 4)
    stopped = jobs.ended("stopped", "Failed", PATIENCE, POLICY)
    assert condition(stopped, "Failed") == ("True", "GuardrailBreached")
    assert condition(stopped, "GuardrailsHealthy") == ("False", "GuardrailBreached")
    assert stopped["attempt"] == 1
    assert "artifact" not in stopped


def test_a_world_that_shrinks_while_held_goes_on_from_the_checkpoint(desk: Desk) -> None:
    """Two pods, held by a guardrail at its checkpoint, then one: another attempt of the same run, not another run.

    The guardrail holds at a known step; a suspension sent while it trains may come when so small a run is over.
    """
    jobs = desk.namespace
    desk.policy(
        "resized",
        {"algorithm": "DPO", "steps": 40, "promptsPerStep": 16},
        nodes=2,
        preferences=desk.source("feedback/careful.jsonl"),
        guardrails=[{"metric": "gradientNorm", "above": 0, "forSteps": 25, "action": "Pause"}],  # no step is below
    )
    jobs.wait(f"{POLICY}/resized", "condition=Suspended", PATIENCE)
    before = jobs.status("resized", POLICY)
    assert len(before["attempts"][0]["podUids"]) == 2
    jobs.patch("resized", POLICY, trainer={"numNodes": 1})
    jobs.decide("go-on-smaller", "PolicyOptimizationJob", "resized", "Acknowledge", attempt=1)
    status = jobs.ended("resized", "Complete", PATIENCE, POLICY)
    assert status["attempt"] == 2
    assert status["progress"]["worldSize"] == 1
    assert status["lineage"]["config"] == before["lineage"]["config"]
    assert (status["attempts"][1]["resumedFromStep"], status["progress"]["step"]) == (25, 40)
